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

  // The layout for the widest of the widths that there is room for; the narrowest is complete, the
  // others hold what differs from it.
  const laidOut = (layouts, room) => {
    const [narrowest, ...wider] = Object.keys(layouts).map(Number).sort((a, b) => a - b);
    const chosen = wider.filter((width) => width <= room).pop();
    return { ...layouts[narrowest], ...(chosen ? layouts[chosen] : {}) };
  };

  // In the page's colours, light or dark.
  const themed = ({ element, text }) => {
    const [ink, soft, line] = [colour("--ink"), colour("--soft"), colour("--line")];
    const { data, layouts, dark, darkWords } = JSON.parse(text);
    const room = onPaper ? PAPER_WIDTH : element.clientWidth;
    const layout = laidOut(layouts, room);
    Object.assign(layout, {
      paper_bgcolor: "rgba(0,0,0,0)",
      plot_bgcolor: "rgba(0,0,0,0)",
      font: { ...layout.font, color: ink, family: "system-ui, sans-serif" },
      modebar: { ...layout.modebar, color: soft, activecolor: ink },
      width: room,
      autosize: false,
    });
    for (const [name, axis] of Object.entries(layout)) {
      if (/^[xy]axis\d*$/.test(name))
        Object.assign(axis, { gridcolor: line, linecolor: soft, zerolinecolor: line, zeroline: false });
      if (/^scene\d*$/.test(name))
        for (const way of ["xaxis", "yaxis", "zaxis"])
          Object.assign(axis[way], { gridcolor: line, zerolinecolor: line, backgroundcolor: "rgba(0,0,0,0)" });
    }
    const isDark = !onPaper && matchMedia("(prefers-color-scheme: dark)").matches;
    if (dark && isDark) layout.coloraxis.colorscale = dark;
    if (darkWords && isDark)
      for (const [place, words] of Object.entries(darkWords)) data[place].text = words;
    // Words in the cells of a heatmap only where they fit.
    const cells = layout.meta.written ? data : data.map((trace) => ({ ...trace, texttemplate: "" }));
    return { data: cells, layout };
  };
  const draw = (figure) => {
    const drawing = themed(figure);
    figure.width = drawing.layout.width;
    figure.element.style.height = `${drawing.layout.height}px`;
    return Plotly.react(figure.element, {
      ...drawing,
      config: { displaylogo: false, displayModeBar: "hover" },
    });
  };

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
  let waiting;
  addEventListener("resize", () => {
    clearTimeout(waiting);
    const changed = (figure) => figure.element.clientWidth !== figure.width;
    waiting = setTimeout(() => onPaper || figures.filter(changed).forEach(draw), 100);
  });
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
