// Draws the curves of a report (html.py) with uPlot, from the JSON in the page. Drag to zoom, double-click to go back.
"use strict";

const WIDEST = 968;
const plots = [];

function shown(value) {
  if (value == null) return "–";
  const size = Math.abs(value);
  return size !== 0 && (size < 1e-3 || size >= 1e6) ? value.toExponential(4) : String(Number(value.toPrecision(8)));
}

function ticks(log) {
  return (plot, values, axis, space, step) => values.map((value) => {
    if (value == null) return "";
    if (log) return value.toExponential(0);
    return String(Number(value.toFixed(Math.min(Math.max(0, 2 - Math.floor(Math.log10(step))), 20))));
  });
}

const whole = Array.from({length: 30}, (_, index) => [1, 2, 5][index % 3] * 10 ** Math.floor(index / 3));

function powers(plot, values) {
  return values.map((value) => (value && Math.abs(Math.log10(value) - Math.round(Math.log10(value))) < 1e-6 ? value : null));
}

function mark(step, colour) {
  return (plot) => {
    if (step === null) return;
    const x = plot.valToPos(step, "x", true);
    const {left, top, width, height} = plot.bbox;
    if (x < left || x > left + width) return;
    plot.ctx.save();
    plot.ctx.strokeStyle = colour;
    plot.ctx.setLineDash([4, 6]);
    plot.ctx.beginPath();
    plot.ctx.moveTo(x, top);
    plot.ctx.lineTo(x, top + height);
    plot.ctx.stroke();
    plot.ctx.restore();
  };
}

for (const curves of JSON.parse(document.getElementById("curves").textContent)) {
  const place = document.getElementById(curves.place);
  const width = () => Math.min(place.clientWidth || WIDEST, WIDEST);
  for (const chart of curves.charts) {
    const lines = chart.lines.map(({label, colour, dash}) => ({
      label, stroke: colour, dash, width: 1.4, points: {show: curves.step.length < 2}, value: (_, value) => shown(value),
    }));
    const options = {
      title: chart.title,
      width: width(),
      height: chart.height,
      cursor: {sync: {key: curves.place}},
      scales: {x: {time: false}, y: {distr: chart.log ? 3 : 1}},
      series: [{label: "step"}, ...lines],
      bands: chart.band ? [{series: chart.band, fill: chart.lines[0].colour + "33"}] : [],
      axes: [{incrs: whole}, {size: 80, values: ticks(chart.log), ...(chart.log ? {grid: {filter: powers}, ticks: {filter: powers}} : {})}],
      hooks: {draw: [mark(curves.mark, curves.colour)]},
    };
    const data = [curves.step, ...chart.lines.map((line) => line.values)];
    plots.push([new uPlot(options, data, place), width]);
  }
}

window.addEventListener("resize", () => {
  for (const [plot, width] of plots) plot.setSize({width: width(), height: plot.height});
});
