// Unpacks the two drawing libraries, which the page holds as gzip, and draws the plotly figures in
// the page's colours. circuitsvis views wait for their library by themselves.
(async () => {
  const unpacked = async (element) => {
    const bytes = Uint8Array.from(atob(element.textContent), (c) => c.charCodeAt(0));
    const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("gzip"));
    return new Response(stream).text();
  };
  const LIGHT = { "--ink": "#1b1f24", "--soft": "#57606a", "--line": "#d0d7de" };
  const PAPER_WIDTH = 640; // fits A4 and letter
  let onPaper = false;
  const colour = (name) =>
    onPaper
      ? LIGHT[name]
      : getComputedStyle(document.documentElement).getPropertyValue(name).trim();
  const figures = [...document.querySelectorAll("figure.plot")].map((figure) => ({
    element: figure.querySelector(".plotly"),
    text: figure.querySelector("script").textContent,
  }));

  // A layout in light or dark: greys of the figure become those of the page.
  const themed = (text) => {
    const [ink, soft, line] = [colour("--ink"), colour("--soft"), colour("--line")];
    const { data, layout, frames } = JSON.parse(text);
    Object.assign(layout, {
      paper_bgcolor: "rgba(0,0,0,0)",
      plot_bgcolor: "rgba(0,0,0,0)",
      font: { ...layout.font, color: ink, family: "system-ui, sans-serif" },
      autosize: !onPaper,
    });
    if (onPaper) layout.width = PAPER_WIDTH;
    for (const [name, axis] of Object.entries(layout)) {
      if (!/^[xy]axis\d*$/.test(name)) continue;
      Object.assign(axis, { gridcolor: line, linecolor: soft, zerolinecolor: line, zeroline: false });
      axis.automargin = true;
    }
    for (const note of layout.annotations ?? []) {
      if (["#444", "#555", "#000"].includes(note.font?.color)) note.font.color = soft;
    }
    return { data, layout, frames };
  };
  const draw = ({ element, text }) =>
    Plotly.react(element, {
      ...themed(text),
      config: { responsive: true, displaylogo: false, displayModeBar: "hover" },
    });

  for (const library of document.querySelectorAll("script.library")) {
    const script = document.createElement("script");
    script.textContent = await unpacked(library);
    document.head.append(script);
    library.remove();
  }
  for (const figure of figures) {
    figure.element.textContent = "";
    await draw(figure);
  }
  const redraw = () => figures.forEach(draw);
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", redraw);
  const print = (starts) => {
    if (onPaper === starts) return;
    onPaper = starts;
    redraw();
  };
  addEventListener("beforeprint", () => print(true));
  addEventListener("afterprint", () => print(false));
  matchMedia("print").addEventListener("change", (event) => print(event.matches));
  document.documentElement.dataset.drawn = figures.length;
})();
