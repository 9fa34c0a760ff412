// Reads a curve under the pointer: nearest logged step, one value a line.
for (const svg of document.querySelectorAll("svg[data-chart]")) {
  const { x, px, y, percent } = JSON.parse(svg.dataset.chart);
  const readout = svg.closest("figure").querySelector(".readout");
  const rule = svg.querySelector(".rule");
  const show = (v) => (v == null ? "–" : percent ? (100 * v).toFixed(1) + " %" : String(+v.toPrecision(3)));
  svg.addEventListener("pointermove", (event) => {
    const box = svg.getBoundingClientRect();
    const at = ((event.clientX - box.left) / box.width) * svg.viewBox.baseVal.width;
    let i = 0;
    px.forEach((p, k) => { if (Math.abs(p - at) < Math.abs(px[i] - at)) i = k; });
    rule.setAttribute("x1", px[i]);
    rule.setAttribute("x2", px[i]);
    rule.style.opacity = 1;
    const names = Object.keys(y);
    readout.textContent = `step ${x[i]}: ` + names.map((n) => (names.length > 1 ? `${n} ` : "") + show(y[n][i])).join(", ");
  });
  svg.addEventListener("pointerleave", () => { rule.style.opacity = 0; readout.textContent = ""; });
}
