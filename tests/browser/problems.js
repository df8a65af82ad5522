// What is wrong to the eye with the cells of a page (elements that each hold one figure), in words:
// clipped, overlapping, unreadable or blank.
(selector) => {
  const problems = [];
  const say = (cell, text) => problems.push(`${cell.id || cell.innerText.slice(0, 60)}: ${text}`);
  const page = document.documentElement;
  if (page.scrollWidth > innerWidth) problems.push(`the page is ${page.scrollWidth} px wide`);

  const numbers = (colour) => (colour.match(/[\d.]+/g) ?? []).map(Number);
  const luminance = (colour) => {
    const [r, g, b] = numbers(colour).map((c) => (c /= 255) <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4);
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  const contrast = (a, b) => {
    const [low, high] = [luminance(a), luminance(b)].sort((x, y) => x - y);
    return (high + 0.05) / (low + 0.05);
  };
  // What a transparent element shows: the paper of the figure, or the first colour around it.
  const ground = (element) => {
    const paper = element.closest?.(".js-plotly-plot")?.querySelector(".main-svg");
    for (let at = paper ?? element; at; at = at.parentElement) {
      const colour = getComputedStyle(at).backgroundColor;
      if (colour !== "transparent" && numbers(colour)[3] !== 0) return colour;
    }
    return "rgb(255, 255, 255)";
  };
  // The colour of the cell of a heatmap that a word stands on, or null outside of all.
  const cellColour = (text) => {
    const box = text.getBoundingClientRect();
    const [x, y] = [(box.left + box.right) / 2, (box.top + box.bottom) / 2];
    for (const image of text.closest(".js-plotly-plot").querySelectorAll(".heatmaplayer image")) {
      const at = image.getBoundingClientRect();
      if (x < at.left || x > at.right || y < at.top || y > at.bottom) continue;
      const canvas = document.createElement("canvas");
      [canvas.width, canvas.height] = [Math.round(at.width), Math.round(at.height)];
      const context = canvas.getContext("2d");
      context.drawImage(image, 0, 0, canvas.width, canvas.height);
      const place = [x - at.left, y - at.top].map((v, i) => Math.min(Math.floor(v), [canvas.width, canvas.height][i] - 1));
      const [r, g, b, a] = context.getImageData(...place, 1, 1).data;
      if (a === 255) return `rgb(${r}, ${g}, ${b})`;
    }
    return null;
  };
  // A title of several lines is as wide as its widest, which may not be the first.
  const linesOf = (text) => {
    const lines = [...text.querySelectorAll("tspan.line")];
    return lines.length ? lines : [text];
  };
  const named = (text) => `"${text.textContent.trim().slice(0, 40)}"`;
  const meet = (a, b, room = 2) =>
    Math.min(a.right, b.right) - Math.max(a.left, b.left) > room &&
    Math.min(a.bottom, b.bottom) - Math.max(a.top, b.top) > room;

  for (const cell of document.querySelectorAll(selector)) {
    const frame = cell.getBoundingClientRect();
    const inside = (box) =>
      box.left >= frame.left - 1 && box.right <= frame.right + 1 &&
      box.top >= frame.top - 1 && box.bottom <= frame.bottom + 1;
    const texts = [...cell.querySelectorAll(".js-plotly-plot svg text")].filter((text) => {
      const style = getComputedStyle(text);
      const box = text.getBoundingClientRect();
      return text.textContent.trim() && box.width > 0 && parseFloat(style.fontSize) > 4 &&
        style.visibility !== "hidden" && !text.closest(".hoverlayer, .modebar");
    });
    // A sheared bounding box is larger than a turned text, but these stand at right angles.
    const boxes = texts.map((text) => text.getBoundingClientRect());
    texts.forEach((text, i) => {
      if (!inside(boxes[i])) say(cell, `${named(text)} is cut off`);
      const fill = getComputedStyle(text).fill;
      const ratio = contrast(fill, ground(text));
      if (text.closest(".heatmap-label")) {
        const under = cellColour(text);
        const ink = getComputedStyle(text.querySelector("tspan[style]") ?? text).fill;
        if (under === null) say(cell, `${named(text)} stands on no cell`);
        else if (contrast(ink, under) < 4.5) say(cell, `${named(text)} in ${ink} on ${under}`);
      } else if (ratio < 3) say(cell, `${named(text)} has a contrast of ${ratio.toFixed(1)}`);
      for (let j = 0; j < i; j++)
        if (meet(boxes[i], boxes[j])) say(cell, `${named(texts[j])} meets ${named(text)}`);
    });
    for (const bar of cell.querySelectorAll(".modebar")) {
      const box = bar.getBoundingClientRect();
      if (box.width && !inside(box)) say(cell, "the toolbar is cut off");
      const covered = [...texts.flatMap(linesOf), ...cell.querySelectorAll("figcaption, .cbfills, .heatmaplayer image")];
      for (const text of covered)
        if (box.width && meet(box, text.getBoundingClientRect())) say(cell, `the toolbar covers ${named(text)}`);
    }
    for (const image of cell.querySelectorAll(".heatmaplayer image, .main-svg, canvas, .circuits-frame, table, li, p"))
      if (!inside(image.getBoundingClientRect())) say(cell, `${image.tagName} ${image.className.baseVal ?? image.className} is cut off`);
    for (const scrolled of cell.querySelectorAll("*"))
      if (scrolled.clientWidth && scrolled.scrollWidth > scrolled.clientWidth + 1 && getComputedStyle(scrolled).overflowX !== "visible" && !scrolled.closest("svg"))
        say(cell, `${scrolled.className} shows ${scrolled.clientWidth} of ${scrolled.scrollWidth} px`);

    for (const plot of cell.querySelectorAll(".js-plotly-plot")) {
      const marks = [...plot.querySelectorAll(".scatterlayer .trace path, .barlayer .point path, .heatmaplayer image, .gl-container canvas")];
      if (!marks.some((mark) => mark.getBoundingClientRect().height > 1)) say(cell, "is blank");
    }
    for (const part of cell.querySelectorAll(".circuits-frame")) {
      if (part.querySelectorAll("canvas, span").length === 0) say(cell, "a view is blank");
      for (const canvas of part.querySelectorAll("canvas")) {
        const pixels = canvas.getContext("2d").getImageData(0, 0, canvas.width, canvas.height).data;
        if (new Set(pixels).size < 10) say(cell, "a pattern is blank");
      }
      if (part.scrollHeight > part.clientHeight + 1 && getComputedStyle(part).overflowY !== "visible")
        say(cell, `a view shows ${part.clientHeight} of ${part.scrollHeight} px`);
      // Names of heads on their colours, which a shade over them may darken.
      for (const name of part.querySelectorAll("h4")) {
        const style = getComputedStyle(name);
        const [under, shade] = [numbers(ground(name)), numbers(style.boxShadow.match(/rgba?\([^)]*\)/)?.[0] ?? "rgba(0, 0, 0, 0)")];
        const mixed = under.slice(0, 3).map((c, i) => c * (1 - (shade[3] ?? 1)) + shade[i] * (shade[3] ?? 1));
        const ratio = contrast(style.color, `rgb(${mixed.join(", ")})`);
        if (ratio < 4.5) say(cell, `${named(name)} has a contrast of ${ratio.toFixed(1)}`);
      }
      const dark = part.closest(".circuits-view").classList.contains("dark");
      if (dark !== luminance(ground(part)) < 0.3) say(cell, "a view is not drawn for its page");
    }
  }
  return problems;
}
