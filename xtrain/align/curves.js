// Draws the curves of a report (html.py) with uPlot, from the JSON in the page. Drag to zoom, double-click to go back.
"use strict";

const steps = Array.from({length: 30}, (_, index) => [1, 2, 5][index % 3] * 10 ** Math.floor(index / 3));

function shown(value) {
  if (value == null) return "–";
  const size = Math.abs(value);
  return size !== 0 && (size < 1e-3 || size >= 1e6) ? value.toExponential(4) : String(Number(value.toPrecision(8)));
}

function labels(plot, values, axis, space, step) {
  const digits = Math.min(Math.max(0, 2 - Math.floor(Math.log10(step))), 20);
  return values.map((value) => String(Number(value.toFixed(digits))));
}

function powersOfTen(plot, values) {
  return values.map((value) => (Math.abs(Math.log10(value) - Math.round(Math.log10(value))) < 1e-6 ? value : null));
}

const powers = {
  grid: {filter: powersOfTen},
  ticks: {filter: powersOfTen},
  values: (plot, values) => values.map((value) => value && value.toExponential(0)),
};

function mark(step, colour) {
  return (plot) => {
    const x = plot.valToPos(step, "x", true);
    const {left, top, width, height} = plot.bbox;
    if (step === null || x < left || x > left + width) return;
    plot.ctx.save();
    plot.ctx.strokeStyle = colour;
    plot.ctx.setLineDash([4, 6]);
    plot.ctx.stroke(new Path2D(`M${x} ${top}V${top + height}`));
    plot.ctx.restore();
  };
}

for (const {place, step, outside, charts} of JSON.parse(document.getElementById("curves").textContent)) {
  const element = document.getElementById(place);
  const [, candidate] = charts[0].lines;
  for (const {title, height, log, band, lines} of charts) {
    const first = lines.length + 1;
    const series = [...lines, ...band].map(({label, colour, dash}, index) => ({
      label, dash, width: 1.4, stroke: index < lines.length ? colour : colour + "33",
      auto: index < lines.length, // a wide band does not flatten the curves
      points: {show: step.length < 2},
      value: (plot, value) => shown(value),
    }));
    new uPlot({
      title, height, width: element.clientWidth,
      cursor: {sync: {key: place}},
      scales: {x: {time: false}, y: {distr: log ? 3 : 1}},
      series: [{label: "step"}, ...series],
      bands: band.length ? [{series: [first + 1, first], fill: band[0].colour + "33"}] : [],
      axes: [{incrs: steps}, {size: 80, values: labels, ...(log ? powers : {})}],
      hooks: {draw: [mark(outside, candidate.colour)]},
    }, [step, ...[...lines, ...band].map((line) => line.values)], element);
  }
}
