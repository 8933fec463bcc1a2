"use strict";
(() => {
  const figures = JSON.parse(document.getElementById("figures").textContent);
  const byId = (id) => document.getElementById(id);
  const dark = window.matchMedia("(prefers-color-scheme: dark)");
  const colour = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();

  function themed(layout, node) {
    const narrow = node.clientWidth < 480;
    const axis = (own = {}) => ({
      automargin: true, exponentformat: own.title?.text === "FLOPs" ? "power" : "SI", gridcolor: colour("--line"), linecolor: colour("--line"), zeroline: false, ...own,
      zerolinecolor: colour("--quiet"), title: { standoff: 8, ...own.title },
    });
    return {
      height: narrow ? 300 : 360, ...layout,
      xaxis: axis(layout.xaxis), yaxis: axis(layout.yaxis),
      paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)",
      font: { family: colour("--sans"), size: narrow ? 11 : 12.5, color: colour("--ink") },
      margin: { l: 8, r: 14, t: 8, b: 8 }, showlegend: false, dragmode: false, hovermode: "closest",
      hoverlabel: { bgcolor: colour("--card"), bordercolor: colour("--line"), font: { color: colour("--ink") } },
    };
  }

  function draw(id, figure) {
    const node = byId(id);
    if (node) Plotly.react(node, figure.data, themed(figure.layout, node), { displayModeBar: false, responsive: true });
  }

  // A cost axis is chosen by the reader; the traces carry every cost.
  function costFigure() {
    const figure = figures["fig-cost"], pick = byId("cost-axis");
    const data = figure.data.map((trace) => ({ ...trace, x: [trace.costs[pick.value]] }));
    const title = { text: pick.selectedOptions[0].text };
    return { data, layout: { ...figure.layout, xaxis: { ...figure.layout.xaxis, title } } };
  }

  function meanOf(runs, metric, unit) {
    const steps = new Map();
    for (const run of runs) {
      (run.y[metric] || []).forEach((y, i) => {
        if (y === null || run.x[unit][i] === null) return;
        const at = steps.get(run.x.step[i]) || { x: 0, y: 0, n: 0 };
        steps.set(run.x.step[i], { x: at.x + run.x[unit][i], y: at.y + y, n: at.n + 1 });
      });
    }
    const most = Math.max(0, ...[...steps.values()].map((s) => s.n));
    const kept = [...steps.entries()].sort((a, b) => a[0] - b[0]).map((e) => e[1]).filter((s) => s.n === most);
    return { x: kept.map((s) => s.x / s.n), y: kept.map((s) => s.y / s.n) };
  }

  function curveFigure() {
    const { curves, looks, units } = figures["fig-curves"];
    const metric = byId("curve-metric").value, unit = byId("curve-axis").value;
    const data = [], without = [];
    for (const [arm, runs] of Object.entries(curves)) {
      const line = (width) => ({ color: looks[arm].colour, dash: looks[arm].dash, width });
      const shown = runs.filter((run) => (run.y[metric] || []).some((y) => y !== null));
      if (!shown.length) { without.push(looks[arm].label); continue; }
      for (const run of shown.length > 1 ? shown : []) {
        const known = run.y[metric].map((y, i) => i).filter((i) => run.y[metric][i] !== null);
        data.push({
          type: "scatter", mode: "lines", line: line(1), opacity: 0.3, hoverinfo: "skip", name: looks[arm].label,
          x: known.map((i) => run.x[unit][i]), y: known.map((i) => run.y[metric][i]),
        });
      }
      const mean = meanOf(shown, metric, unit);
      data.push({ type: "scatter", mode: mean.x.length > 1 ? "lines" : "markers", line: line(2.6), name: looks[arm].label, ...mean });
    }
    const decoded = document.createElement("textarea");
    decoded.innerHTML = without.join(", ");
    byId("curve-note").textContent = without.length ? `Not logged by: ${decoded.value}.` : "";
    return { data, layout: { xaxis: { title: { text: units[unit] }, rangemode: "tozero" }, yaxis: { title: { text: metric } } } };
  }

  function drawAll() {
    for (const id of Object.keys(figures)) {
      if (id === "fig-cost") draw(id, costFigure());
      else if (id === "fig-curves") draw(id, curveFigure());
      else draw(id, figures[id]);
    }
  }

  function sortBy(table, column) {
    const head = table.tHead.rows[0].cells[column];
    const down = head.getAttribute("aria-sort") !== "descending";
    for (const cell of table.tHead.rows[0].cells) cell.setAttribute("aria-sort", "none");
    head.setAttribute("aria-sort", down ? "descending" : "ascending");
    const key = (row) => row.cells[column].dataset.value;
    const compare = (a, b) => {
      const [x, y] = [key(a), key(b)];
      if (x === undefined || y === undefined) return (x === undefined) - (y === undefined);
      const order = column === 0 ? y.localeCompare(x) : Number(x) - Number(y);
      return down ? -order : order;
    };
    table.tBodies[0].append(...[...table.tBodies[0].rows].sort(compare));
  }

  function tables() {
    for (const table of document.querySelectorAll("table.sortable")) {
      [...table.tHead.rows[0].cells].forEach((cell, i) => cell.querySelector("button").addEventListener("click", () => sortBy(table, i)));
    }
    const filter = byId("arm-filter");
    filter.addEventListener("input", () => {
      const words = filter.value.toLowerCase().split(/\s+/).filter(Boolean);
      for (const row of byId("measures").tBodies[0].rows) {
        row.hidden = !words.every((word) => row.dataset.name.toLowerCase().includes(word));
      }
    });
    for (const box of document.querySelectorAll("input[data-group]")) {
      const apply = () => {
        for (const cell of byId("measures").querySelectorAll(`[data-group="${box.dataset.group}"]`)) cell.hidden = !box.checked;
      };
      box.addEventListener("change", apply);
      apply();
    }
  }

  tables();
  drawAll();
  byId("cost-axis")?.addEventListener("change", () => draw("fig-cost", costFigure()));
  for (const id of ["curve-metric", "curve-axis"]) byId(id)?.addEventListener("change", () => draw("fig-curves", curveFigure()));
  dark.addEventListener("change", drawAll);
})();
