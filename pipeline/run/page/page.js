"use strict";
// The slider of each history, and the charts. Plotly lies in this page, compressed: a third of its size.

for (const figure of document.querySelectorAll(".history")) {
  const earlier = figure.querySelector(".frames");
  if (!earlier) continue;
  const shown = figure.querySelector("img"), output = figure.querySelector("output");
  const slider = figure.querySelector("input"), button = figure.querySelector("button");
  const last = { uri: shown.src, kimg: JSON.parse(figure.querySelector(".last").textContent) };
  const frames = [...JSON.parse(earlier.textContent), last];
  let timer = 0;
  const show = () => {
    const frame = frames[slider.valueAsNumber];
    shown.src = frame.uri;
    output.textContent = `kimg ${frame.kimg}`;
    slider.setAttribute("aria-valuetext", output.textContent);
  };
  const stop = () => {
    clearInterval(timer);
    timer = 0;
    button.textContent = "▶";
  };
  const step = () => {
    if (slider.valueAsNumber >= frames.length - 1) return stop();
    slider.valueAsNumber += 1;
    show();
  };
  button.addEventListener("click", () => {
    if (timer) return stop();
    if (slider.valueAsNumber >= frames.length - 1) slider.valueAsNumber = 0;
    show();
    button.textContent = "❚❚";
    timer = setInterval(step, 220);
  });
  slider.addEventListener("input", () => { stop(); show(); });
  show();
  figure.querySelector(".controls").hidden = false;
}

async function loadPlotly() {
  const packed = Uint8Array.from(atob(document.getElementById("plotly").textContent), (c) => c.charCodeAt(0));
  const stream = new Blob([packed]).stream().pipeThrough(new DecompressionStream("gzip"));
  const script = document.createElement("script");
  script.textContent = await new Response(stream).text();
  document.head.append(script);
}

const colour = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();
// Text is drawn as it is: Plotly would read some tags in it.
const plain = (text) => String(text).replaceAll("&", "&amp;").replaceAll("<", "&lt;").replaceAll(">", "&gt;");

function curves(chart) {
  const many = chart.traces.length > 12;
  const bands = chart.traces.filter((trace) => trace.low).map((trace) => ({
    x: [...trace.x, ...trace.x.toReversed()], y: [...trace.low, ...trace.high.toReversed()], fill: "toself",
    type: "scatter", mode: "none", fillcolor: trace.colour + "33", legendgroup: trace.name, showlegend: false, hoverinfo: "skip",
  }));
  return bands.concat(chart.traces.map((trace) => ({
    x: trace.x, y: trace.y, name: plain(trace.name), legendgroup: trace.name, showlegend: trace.first !== false,
    type: "scatter", mode: trace.x.length > 1 ? "lines" : "markers",
    line: { color: trace.colour, width: many ? 1.1 : 1.8 }, marker: { color: trace.colour },
    hovertemplate: many ? "%{fullData.name}: %{y:.4g} at kimg %{x:.4g}<extra></extra>" : "%{y:.4g}",
  })));
}

function candidates(chart) {
  const found = chart.candidates, labels = found.map((c) => plain(c.label));
  const axes = (at, scores) => (chart.upright ? { x: at, y: scores } : { x: scores, y: at });
  const error = { type: "data", array: found.map((c) => c.error), color: colour("--accent"), thickness: 1.6, width: 5 };
  const trials = found.flatMap((c) => c.scores.map((score) => [plain(c.label), score]));
  const chosen = found.filter((c) => chart.chosen.includes(c.label));
  const score = chart.upright ? "%{y:.4g}" : "%{x:.4g}";
  return [
    { ...axes(labels, found.map((c) => c.mean)), name: "mean ± standard error", mode: chart.upright ? "lines+markers" : "markers",
      [chart.upright ? "error_y" : "error_x"]: error, line: { color: colour("--accent"), width: 1.4 },
      marker: { size: 8, color: colour("--accent") }, hovertemplate: `mean ${score}<extra></extra>` },
    { ...axes(trials.map((t) => t[0]), trials.map((t) => t[1])), name: "a training", mode: "markers",
      marker: { size: 6, color: colour("--quiet"), opacity: 0.65 }, hovertemplate: `${score}<extra></extra>` },
    { ...axes(chosen.map((c) => plain(c.label)), chosen.map((c) => c.mean)), name: "chosen", mode: "markers", hoverinfo: "skip",
      marker: { size: 18, symbol: "circle-open", color: "#d9822b", line: { width: 2.5 } } },
  ];
}

function draw(figure) {
  const chart = JSON.parse(figure.querySelector(".data").textContent), plot = figure.querySelector(".plot");
  const axis = { gridcolor: colour("--line"), zerolinecolor: colour("--line"), linecolor: colour("--line"), automargin: true };
  const number = { ...axis, ...(chart.log ? { type: "log", dtick: chart.decades > 2.5 ? 1 : "D2" } : { nticks: 6 }), tickformat: "~g" };
  const names = { ...axis, type: "category", tickfont: { size: 11 } };
  const touch = matchMedia("(pointer: coarse)").matches; // a finger scrolls the page rather than zooms a chart
  const traces = chart.candidates ? candidates(chart) : curves(chart);
  const title = { text: plain(chart.x), font: { size: 11 }, standoff: 6 };
  const upright = !chart.candidates || chart.upright;
  if (!upright) plot.style.height = `${Math.max(14, 6 + 1.8 * chart.candidates.length)}rem`;
  Plotly.react(plot, traces, {
    margin: { l: 10, r: 12, t: 8, b: 8 }, paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)",
    font: { family: "system-ui, -apple-system, Segoe UI, Roboto, sans-serif", size: 11.5, color: colour("--quiet") },
    hovermode: chart.candidates || traces.length > 12 ? "closest" : "x unified", dragmode: touch ? false : "zoom",
    hoverlabel: { bgcolor: colour("--card"), bordercolor: colour("--line"), font: { color: colour("--ink") } },
    showlegend: traces.length > 1, legend: { orientation: "h", y: 1.02, yanchor: "bottom", x: 0, font: { size: 11 } },
    xaxis: { ...(upright ? (chart.candidates ? names : axis) : number), title },
    yaxis: upright ? number : { ...names, autorange: "reversed" },
  }, { displayModeBar: false, responsive: true });
}

loadPlotly().then(() => {
  const all = () => document.querySelectorAll(".chart").forEach(draw);
  document.documentElement.classList.remove("static");
  all();
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", all);
}, () => {}); // an old browser: the picture of the curves stays
