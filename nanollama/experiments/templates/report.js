// Reads values off the charts under the pointer. The page is whole without it.
"use strict";
for (const panel of document.querySelectorAll("[data-chart]")) {
  const series = JSON.parse(document.getElementById(panel.dataset.chart).textContent);
  const readout = document.createElement("div");
  readout.className = "readout";
  const shown = (value) => Math.abs(value) >= 1000 ? Math.round(value).toLocaleString("en") : String(+value.toPrecision(4));
  const nearest = (points, x) => points.reduce((a, b) => Math.abs(b[0] - x) < Math.abs(a[0] - x) ? b : a);
  for (const svg of panel.querySelectorAll("svg.chart")) {
    const scale = (text) => {
      const [low, high, start, end] = text.split(" ").map(Number);
      return { to: (v) => start + (v - low) / (high - low || 1) * (end - start),
               from: (p) => low + (p - start) / (end - start) * (high - low) };
    };
    const x = scale(svg.dataset.x), y = scale(svg.dataset.y), cursor = svg.querySelector(".cursor");
    const draw = (name, attributes) => {
      const node = document.createElementNS("http://www.w3.org/2000/svg", name);
      for (const key in attributes) node.setAttribute(key, attributes[key]);
      cursor.append(node);
    };
    svg.addEventListener("pointermove", (event) => {
      const box = svg.getBoundingClientRect();
      const step = nearest(series[0].points, x.from((event.clientX - box.left) / box.width * svg.viewBox.baseVal.width))[0];
      const top = y.to(Number(svg.dataset.y.split(" ")[1])), bottom = y.to(Number(svg.dataset.y.split(" ")[0]));
      const lines = [`step ${step.toLocaleString("en")}`];
      cursor.replaceChildren();
      draw("line", { x1: x.to(step), x2: x.to(step), y1: top, y2: bottom });
      for (const item of series) {
        const point = nearest(item.points, step);
        draw("circle", { class: item.role, r: 4.5, cx: x.to(point[0]), cy: Math.max(y.to(point[1]), top) });
        lines.push(`${item.name} ${shown(point[1])}` + (point[0] === step ? "" : ` (step ${point[0].toLocaleString("en")})`));
      }
      readout.textContent = lines.join("  ·  ");
      document.body.append(readout);
      const left = Math.min(event.clientX + 14, document.documentElement.clientWidth - readout.offsetWidth - 8);
      readout.style.left = `${Math.max(left, 8)}px`;
      readout.style.top = `${event.clientY + 18}px`;
    });
    svg.addEventListener("pointerleave", () => { cursor.replaceChildren(); readout.remove(); });
  }
}
