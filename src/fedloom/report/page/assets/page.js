// The charts of the page: drawn from the descriptions in #data, kept in step with the runs where the page is live.
"use strict";
(() => {
  const held = JSON.parse(document.getElementById("data").textContent);
  const root = document.documentElement, spoken = document.getElementById("spoken");
  const POLL_MS = 2000, AWAY_MS = 5000; // between two looks; after one that failed, or where all is over
  const figures = new Map(); // id → the chart that is drawn and what its reader has done with it
  const probe = document.body.appendChild(document.createElement("i"));
  probe.hidden = true;

  // ---- colours: those of the style sheet, as the theme has them now ----
  let inks = {};
  function readInks(theme) {
    const wished = root.dataset.theme, found = {};
    if (theme) root.dataset.theme = theme;
    for (const name of ["ink", "soft", "line", "grid", "paper", "raised", ...range(8).map((n) => `c${n}`), ...range(5).map((n) => `h${n}`)]) {
      probe.style.color = `var(--${name})`;
      found[name] = getComputedStyle(probe).color;
    }
    if (theme) wished ? (root.dataset.theme = wished) : delete root.dataset.theme;
    return found;
  }
  const colour = (slot, ink = inks) => (slot < 0 ? ink.ink : ink[`c${slot % 8}`]);
  function ramp(share, ink) {
    const stops = range(5).map((n) => ink[`h${n}`].match(/\d+(\.\d+)?/g).map(Number));
    const at = Math.min(Math.max(share, 0), 1) * 4, low = Math.min(Math.floor(at), 3);
    return `rgb(${stops[low].slice(0, 3).map((from, n) => Math.round(from + (stops[low + 1][n] - from) * (at - low)))})`;
  }
  // The states of a map of attendance, from "not asked" to "failed".
  const stateInk = (place, ink) => [ink.grid, ink.c4, ink.c2, ink.c1, ink.c5][place] || ink.soft;

  // ---- numbers ----
  function range(count) { return Array.from({ length: count }, (_, n) => n); }
  const plain = (value) => (Number.isInteger(value) && Math.abs(value) < 1e15 ? value.toLocaleString("en") : String(+value.toPrecision(4)));
  function show(value, axis) {
    if (value === null || value === undefined) return "–";
    if (axis.names.length) return axis.names[value];
    if (axis.unit === "bytes") {
      for (const unit of ["B", "KiB", "MiB"]) {
        if (Math.abs(value) < 1024) return unit === "B" ? `${Math.round(value)} B` : `${value.toFixed(1)} ${unit}`;
        value /= 1024;
      }
      return `${value.toFixed(2)} GiB`;
    }
    if (axis.unit === "seconds") {
      if (value < 60) return value > 0 && value < 0.05 ? "< 0.1 s" : `${value.toFixed(1)} s`;
      const whole = Math.round(value);
      return whole >= 3600 ? `${Math.floor(whole / 3600)} h ${Math.floor((whole % 3600) / 60)} min` : `${Math.floor(whole / 60)} min ${whole % 60} s`;
    }
    return axis.unit === "%" ? `${plain(value)} %` : plain(value);
  }
  // Scales are drawn in the largest unit that fits, so that their marks are round numbers of it.
  function unitOf(axis, most) {
    if (axis.unit === "bytes") {
      const place = most > 0 ? Math.min(Math.floor(Math.log(most) / Math.log(1024)), 3) : 0;
      return { by: 1024 ** Math.max(place, 0), name: ["B", "KiB", "MiB", "GiB"][Math.max(place, 0)] };
    }
    if (axis.unit === "seconds") {
      return most >= 7200 ? { by: 3600, name: "h" } : most >= 180 ? { by: 60, name: "min" } : { by: 1, name: "s" };
    }
    return { by: 1, name: axis.unit };
  }
  const titled = (axis, unit) => (unit.name && !axis.title.includes(`(${unit.name})`) ? `${axis.title === "seconds" || axis.title === "bytes" ? "" : `${axis.title} `}(${unit.name})` : axis.title).replace(/^\((.*)\)$/, "$1");
  const finite = (values) => values.filter((value) => value !== null && value !== undefined && Number.isFinite(value));

  // ---- from a description to what ECharts draws ----
  function valueAxis(axis, values, ink, extra) {
    const known = finite(values), most = Math.max(...known, 0), unit = unitOf(axis, most);
    // A logarithm tells nothing where all is of one size.
    const least = Math.min(...known), log = axis.log && known.length > 0 && least > 0 && most / least >= 10;
    // Powers of 2, 4 or 32 of a byte are round numbers of KiB, MiB and GiB: each mark has a unit of its own.
    const own = log && axis.unit === "bytes";
    if (own) Object.assign(unit, { by: 1, name: "" });
    const shown = {
      type: log ? "log" : "value", name: titled(axis, unit), nameLocation: "middle", scale: axis.low === null,
      axisLine: { lineStyle: { color: ink.line } }, axisTick: { show: false },
      splitLine: { lineStyle: { color: ink.grid } }, nameTextStyle: { color: ink.soft, fontSize: 12 },
      axisLabel: { color: ink.soft, fontSize: 11, hideOverlap: true, formatter: (value) => (own ? show(value, axis).replace(/\.0+ /, " ") : plain(value)) }, ...extra,
    };
    if (own) shown.logBase = most / least < 40 ? 2 : most / least < 5000 ? 4 : 32;
    if (axis.low !== null && !log) shown.min = axis.low / unit.by;
    if (axis.high !== null) shown.max = axis.high / unit.by;
    if (axis.whole) shown.minInterval = 1;
    return { shown, by: unit.by };
  }
  const nameAxis = (axis, ink, extra) => ({
    type: "category", data: axis.names, axisLine: { lineStyle: { color: ink.line } }, axisTick: { show: false },
    splitLine: { show: false }, nameTextStyle: { color: ink.soft, fontSize: 12 }, ...extra,
    axisLabel: { color: ink.soft, fontSize: 11, ...(extra || {}).axisLabel },
  });
  const base = (ink) => ({
    animation: false, textStyle: { fontFamily: getComputedStyle(document.body).fontFamily.replaceAll('"', "'"), color: ink.ink }, backgroundColor: "transparent",
    tooltip: {
      confine: true, backgroundColor: ink.paper, borderColor: ink.line, borderWidth: 1, padding: [7, 10],
      textStyle: { color: ink.ink }, extraCssText: "box-shadow: 0 4px 16px rgb(0 0 0 / .14); border-radius: 8px;", transitionDuration: 0,
    },
  });
  const GRID = { left: 8, right: 18, top: 12, bottom: 8, outerBoundsMode: "same", outerBoundsContain: "all", outerBounds: { left: 4, right: 10, top: 8, bottom: 4 } };
  const SYMBOLS = ["circle", "rect", "triangle", "diamond"], DASHES = ["solid", [7, 4], [2, 3], [9, 3, 2, 3]];

  function tip(title, lines) {
    const box = document.createElement("div");
    box.className = "tip";
    box.append(Object.assign(document.createElement("b"), { textContent: title }));
    for (const [ink, name, value] of lines) {
      const line = box.appendChild(document.createElement("div")), mark = document.createElement("i");
      mark.style.background = ink;
      line.append(mark, Object.assign(document.createElement("span"), { textContent: name }), Object.assign(document.createElement("em"), { textContent: value }));
    }
    return box;
  }
  const pointText = (point, axis) => show(point[1], axis) + (point.length > 3 && point[1] !== null ? ` (${show(point[2], axis)} to ${show(point[3], axis)})` : "");

  function drawLines(chart, hidden, ink) {
    const seen = chart.series.filter((one) => !hidden.has(one.name));
    const points = seen.flatMap((one) => one.points), stacked = chart.kind === "stack";
    const x = valueAxis(chart.x, points.map((p) => p[0]), ink, { nameGap: 26, splitLine: { show: false } });
    const sums = new Map();
    for (const p of points) sums.set(p[0], (sums.get(p[0]) || 0) + (p[1] || 0));
    const y = valueAxis(chart.y, stacked ? [...sums.values()] : points.flatMap((p) => p.slice(1)), ink, { nameGap: 40, axisLine: { show: false } });
    if (!chart.x.log && points.length && chart.x.unit === "") Object.assign(x.shown, { min: "dataMin", max: "dataMax" });
    const series = [];
    for (const one of seen) {
      const ends = one.points.filter((p) => p.length > 3 && p[2] !== null && p[3] !== null);
      if (ends.length > 1) {
        series.push({
          type: "custom", silent: true, tooltip: { show: false }, z: 1, clip: true, encode: { x: 0, y: [1, 2] },
          data: ends.map((p) => [p[0] / x.by, p[2] / y.by, p[3] / y.by]),
          renderItem: (params, api) => params.dataIndex ? null : {
            type: "polygon", style: { fill: colour(one.slot, ink), opacity: 0.13 },
            shape: { points: [...ends.map((p) => api.coord([p[0] / x.by, p[3] / y.by])), ...ends.map((p) => api.coord([p[0] / x.by, p[2] / y.by])).reverse()] },
          },
        });
      }
      series.push({
        type: "line", name: one.name, data: one.points.map((p) => [p[0] / x.by, p[1] === null ? null : p[1] / y.by]),
        color: colour(one.slot, ink), symbol: SYMBOLS[Math.max(one.slot, 0) % 4], symbolSize: one.style === "thin" ? 4 : 5.5,
        showSymbol: one.points.length <= 30 && !stacked, z: one.slot < 0 ? 4 : 3, connectNulls: false, emphasis: { disabled: true },
        lineStyle: { width: one.style === "thin" ? 1.2 : one.style === "bold" ? 2.6 : 2, type: DASHES[Math.floor(Math.max(one.slot, 0) / 8) % 4], opacity: one.style === "thin" ? 0.85 : 1 },
        ...(stacked ? { stack: "all", areaStyle: { opacity: 0.75 }, lineStyle: { width: 0.5 } } : {}),
      });
    }
    const option = { ...base(ink), grid: GRID, xAxis: x.shown, yAxis: y.shown, series, dataZoom: [{ type: "inside", filterMode: "none", zoomOnMouseWheel: "ctrl", moveOnMouseMove: matchMedia("(pointer: fine)").matches, preventDefaultMouseMove: false }] };
    Object.assign(option.tooltip, {
      trigger: "axis", axisPointer: { type: "line", lineStyle: { color: ink.soft, width: 1 }, label: { show: false } },
      formatter: (told) => {
        const own = told.filter((one) => one.seriesType === "line");
        if (!own.length) return "";
        const at = own[0].value[0];
        const lines = own.map((one) => { const from = seen.find((s) => s.name === one.seriesName); return [one.color, one.seriesName, pointText(from.points[one.dataIndex], chart.y)]; });
        return tip(`${chart.x.title === "round" ? "Round " : ""}${show(at * x.by, chart.x)}`, lines);
      },
    });
    return { option, height: 290 };
  }

  function drawBars(chart, hidden, ink, width) {
    const seen = chart.series.filter((one) => !hidden.has(one.name));
    const sums = chart.y.names.map((_, place) => seen.reduce((sum, one) => sum + ((one.points.find((p) => p[1] === place) || [0])[0] || 0), 0));
    const x = valueAxis(chart.x, sums, ink, { nameGap: 26 });
    const y = nameAxis(chart.y, ink, { inverse: true, axisLine: { show: false }, axisLabel: { width: Math.min(170, width * 0.3), overflow: "truncate", interval: 0 } });
    const series = seen.map((one) => ({
      type: "bar", name: one.name, stack: "all", color: colour(one.slot, ink), barMaxWidth: 20, barCategoryGap: "35%", emphasis: { disabled: true },
      itemStyle: { borderColor: ink.paper, borderWidth: 0.5 },
      data: chart.y.names.map((_, place) => { const p = one.points.find((q) => q[1] === place); return p && p[0] !== null ? p[0] / x.by : 0; }),
    }));
    const option = { ...base(ink), grid: GRID, xAxis: x.shown, yAxis: y, series };
    Object.assign(option.tooltip, {
      trigger: "axis", axisPointer: { type: "shadow", shadowStyle: { color: ink.grid, opacity: 0.6 }, label: { show: false } },
      formatter: (told) => {
        const lines = told.map((one) => [one.color, one.seriesName, show(one.value * x.by, chart.x)]);
        if (lines.length > 1) lines.push(["transparent", "in all", show(sums[told[0].dataIndex], chart.x)]);
        return tip(told[0].name, lines);
      },
    });
    return { option, height: Math.max(120, 62 + chart.y.names.length * 30) };
  }

  function drawDots(chart, hidden, ink) {
    const seen = chart.series.filter((one) => !hidden.has(one.name)), points = seen.flatMap((one) => one.points);
    const x = valueAxis(chart.x, points.map((p) => p[0]), ink, { nameGap: 26, splitLine: { lineStyle: { color: ink.grid } } });
    const y = valueAxis(chart.y, points.flatMap((p) => p.slice(1)), ink, { nameGap: 42, axisLine: { show: false } });
    // Names stand on the side that has more room, clear of the bars of their intervals.
    const places = seen.filter((one) => one.slot >= 0).sort((a, b) => a.points[0][0] - b.points[0][0]);
    const series = seen.flatMap((one) => {
      const own = one.points.map((p) => [p[0] / x.by, p[1] / y.by]);
      if (one.slot < 0) return [{ type: "line", step: false, name: one.name, data: own, symbol: "none", silent: true, color: ink.soft, lineStyle: { width: 1, type: [4, 4] }, z: 1, tooltip: { show: false } }];
      const bars = {
        type: "custom", silent: true, tooltip: { show: false }, z: 2, encode: { x: 0, y: [1, 2] },
        data: one.points.filter((p) => p.length > 3 && p[2] !== null && p[3] > p[2]).map((p) => [p[0] / x.by, p[2] / y.by, p[3] / y.by]),
        renderItem: (params, api) => { const [px, low] = api.coord([api.value(0), api.value(1)]), high = api.coord([api.value(0), api.value(2)])[1]; return { type: "line", shape: { x1: px, y1: low, x2: px, y2: high }, style: { stroke: colour(one.slot, ink), lineWidth: 1.5, opacity: 0.6 } }; },
      };
      const dots = {
        type: "scatter", name: one.name, data: own, color: colour(one.slot, ink), symbol: SYMBOLS[one.slot % 4], symbolSize: 12, z: 5, itemStyle: { opacity: 1 },
        label: { show: true, formatter: () => (one.name.length > 28 ? `${one.name.slice(0, 27)}…` : one.name), position: places.indexOf(one) >= places.length / 2 ? "left" : "right", color: ink.ink, fontSize: 12, distance: 8 }, labelLayout: { hideOverlap: true }, emphasis: { scale: 1.25 },
      };
      return [bars, dots];
    });
    const option = { ...base(ink), grid: { ...GRID, top: 26, right: 40 }, xAxis: x.shown, yAxis: y.shown, series };
    Object.assign(option.tooltip, {
      trigger: "item",
      formatter: (told) => { const from = seen.find((one) => one.name === told.seriesName), p = from.points[told.dataIndex]; return tip(from.name, [[told.color, chart.x.title, show(p[0], chart.x)], ["transparent", chart.y.title, pointText(p, chart.y)]]); },
    });
    return { option, height: 380 };
  }

  function drawHeat(chart, hidden, ink) {
    const cells = chart.series[0].points, known = finite(cells.map((cell) => cell[2])), states = chart.scale.names.length > 0;
    const low = chart.scale.low ?? Math.min(...known), high = chart.scale.high ?? Math.max(...known);
    const fill = (value) => value === null ? "transparent" : states ? stateInk(value, ink) : ramp(high > low ? (value - low) / (high - low) : 0.5, ink);
    const rows = chart.y.names.length, size = rows > 30 ? 13 : rows > 12 ? 18 : 24;
    const option = {
      ...base(ink), grid: { ...GRID, top: 6 },
      xAxis: nameAxis(chart.x, ink, { name: chart.x.title, nameLocation: "middle", nameGap: 28, axisLine: { show: false }, axisLabel: { hideOverlap: true, width: 90, overflow: "truncate", rotate: chart.x.title === "round" || chart.x.names.length < 9 && Math.max(...chart.x.names.map((n) => n.length)) < 9 ? 0 : 38 } }),
      yAxis: nameAxis(chart.y, ink, { inverse: true, name: "", axisLine: { show: false }, axisLabel: { width: 110, overflow: "truncate", interval: "auto" } }),
      series: [{
        type: "custom", data: cells.map((cell) => [cell[0], cell[1], cell[2]]), encode: { x: 0, y: 1 }, clip: true,
        renderItem: (params, api) => {
          const [px, py] = api.coord([api.value(0), api.value(1)]), [w, h] = api.size([1, 1]), gap = Math.min(1, w * 0.08);
          return { type: "rect", shape: { x: px - w / 2 + gap, y: py - h / 2 + gap, width: Math.max(w - 2 * gap, 0.5), height: Math.max(h - 2 * gap, 0.5), r: 1.5 }, style: { fill: fill(cells[params.dataIndex][2]) }, emphasis: { style: { stroke: ink.ink, lineWidth: 1.5 } } };
        },
      }],
    };
    Object.assign(option.tooltip, {
      trigger: "item",
      formatter: (told) => { const cell = cells[told.dataIndex]; return tip(`${chart.y.title} ${chart.y.names[cell[1]]}, ${chart.x.title} ${chart.x.names[cell[0]]}`, [[fill(cell[2]), chart.scale.title, show(cell[2], chart.scale)]]); },
    });
    return { option, height: Math.max(110, rows * size + 70), low, high, states };
  }

  const DRAW = { lines: drawLines, stack: drawLines, bars: drawBars, dots: drawDots, heat: drawHeat };

  // ---- one figure: its plot, legend and buttons ----
  function element(kind, words = {}, ...inside) {
    const made = Object.assign(document.createElement(kind), words);
    made.append(...inside);
    return made;
  }
  function swatch(slot, ink) {
    const mark = element("span");
    mark.innerHTML = '<svg width="14" height="10" aria-hidden="true"><rect y="3" width="14" height="4" rx="2"></rect></svg>';
    mark.querySelector("rect").setAttribute("fill", typeof slot === "string" ? slot : colour(slot, ink));
    mark.style.display = "inline-flex";
    return mark;
  }
  function setUp(chart) {
    const place = document.querySelector(`[data-chart="${CSS.escape(chart.id)}"]`);
    if (!place) return;
    let figure = figures.get(chart.id);
    if (figure && figure.place !== place) { figure.drawn.dispose(); figure = undefined; }
    if (!figure) {
      figure = { place, hidden: new Set(), at: -1, zoom: [0, 100] };
      place.style.height = `${DRAW[chart.kind](chart, figure.hidden, inks, place.clientWidth).height}px`;
      figure.drawn = echarts.init(place, null, { renderer: "svg" });
      figure.legend = element("ul", { className: "legend" });
      place.before(figure.legend);
      place.closest("figure").querySelector(".below").append(tools(chart.id));
      place.addEventListener("keydown", (event) => pressed(event, chart.id));
      place.addEventListener("blur", () => figure.drawn.dispatchAction({ type: "hideTip" }));
      figure.drawn.on("datazoom", () => { const zoom = figure.drawn.getOption().dataZoom[0]; figure.zoom = [zoom.start, zoom.end]; });
      figures.set(chart.id, figure);
    }
    figure.chart = chart;
    redraw(figure);
  }
  function redraw(figure) {
    const { chart, place, hidden, drawn } = figure;
    const made = DRAW[chart.kind](chart, hidden, inks, place.clientWidth);
    if (made.option.dataZoom) Object.assign(made.option.dataZoom[0], { start: figure.zoom[0], end: figure.zoom[1] });
    place.style.height = `${made.height}px`;
    drawn.resize();
    drawn.setOption(made.option, { notMerge: false, replaceMerge: ["series"] });
    drawLegend(figure, made);
    setBox(figure);
  }
  // A drawing that knows its size can be fitted to paper.
  function setBox({ place, drawn }) { place.querySelector("svg")?.setAttribute("viewBox", `0 0 ${drawn.getWidth()} ${drawn.getHeight()}`); }
  function drawLegend(figure, made) {
    const { chart, legend, hidden } = figure, items = [];
    if (chart.kind === "heat") {
      if (made.states) chart.scale.names.forEach((name, place) => { if (chart.series[0].points.some((cell) => cell[2] === place)) items.push(element("span", { className: "key" }, swatch(stateInk(place, inks)), name)); });
      else if (Number.isFinite(made.low)) {
        const bar = element("span", { className: "key" });
        bar.append(show(made.low, chart.scale), element("span"), show(made.high, chart.scale));
        bar.children[0].style.cssText = `width:7rem;height:.6rem;border-radius:3px;background:linear-gradient(90deg, ${range(5).map((n) => inks[`h${n}`])})`;
        if (made.high > made.low) items.push(bar); else items.push(element("span", { className: "key" }, `${show(made.low, chart.scale)} throughout`));
      }
    } else if (chart.series.length > 1) {
      for (const one of chart.series) {
        const button = element("button", { type: "button" }, swatch(one.slot, inks), one.name);
        button.setAttribute("aria-pressed", String(!hidden.has(one.name)));
        button.addEventListener("click", () => { hidden.has(one.name) ? hidden.delete(one.name) : hidden.add(one.name); redraw(figure); [...legend.querySelectorAll("button")].find((b) => b.textContent === one.name)?.focus(); });
        items.push(button);
      }
    }
    legend.replaceChildren(...items.map((item) => element("li", {}, item)));
    legend.hidden = !items.length;
  }
  function tools(id) {
    const bar = element("div", { className: "tools" }), name = figures.get(id)?.chart.title || held.charts.find((one) => one.id === id).title;
    const add = (text, label, does, kind = "") => { const made = element("button", { type: "button", textContent: text, className: kind }); made.setAttribute("aria-label", `${label}: ${name}`); made.title = label; made.addEventListener("click", does); bar.append(made); };
    const chart = held.charts.find((one) => one.id === id);
    if (["lines", "stack"].includes(chart.kind)) {
      add("−", "Zoom out", () => zoomBy(id, 2));
      add("+", "Zoom in", () => zoomBy(id, 0.5));
      add("↺", "Show all", () => zoomTo(id, [0, 100]));
    }
    add("CSV", "Save as CSV", () => save(id, "csv"), "apart");
    add("SVG", "Save as SVG", () => save(id, "svg"));
    add("PNG", "Save as PNG", () => save(id, "png"));
    return bar;
  }
  function zoomTo(id, [start, end]) {
    const figure = figures.get(id);
    figure.zoom = [Math.max(0, start), Math.min(100, end)];
    figure.drawn.dispatchAction({ type: "dataZoom", start: figure.zoom[0], end: figure.zoom[1] });
  }
  function zoomBy(id, factor) {
    const [start, end] = figures.get(id).zoom, middle = (start + end) / 2, half = Math.min(Math.max(((end - start) / 2) * factor, 1), 50);
    const from = Math.min(Math.max(middle - half, 0), 100 - 2 * half);
    zoomTo(id, [from, from + 2 * half]);
  }
  // Arrow keys go from point to point, and what is there is shown and spoken.
  function pressed(event, id) {
    const figure = figures.get(id), { chart, drawn } = figure;
    const seen = chart.series.filter((one) => !figure.hidden.has(one.name));
    const along = { bars: chart.y.names.length, dots: seen.filter((one) => one.slot >= 0).length, heat: chart.series[0]?.points.length }[chart.kind] ?? Math.max(...seen.map((one) => one.points.length), 0);
    const step = { ArrowRight: 1, ArrowDown: chart.kind === "heat" ? chart.x.names.length : 1, ArrowLeft: -1, ArrowUp: chart.kind === "heat" ? -chart.x.names.length : -1 }[event.key];
    if (step && along) {
      figure.at = Math.min(Math.max(figure.at + (figure.at < 0 ? 1 : step), 0), along - 1);
      if (chart.kind === "dots") drawn.dispatchAction({ type: "showTip", seriesName: undefined, seriesIndex: figure.at * 2 + 1, dataIndex: 0 });
      else {
        const series = drawn.getOption().series.map((one, n) => [n, one]).filter(([, one]) => one.type !== "custom" || chart.kind === "heat");
        const [longest] = series.sort((a, b) => b[1].data.length - a[1].data.length)[0];
        drawn.dispatchAction({ type: "showTip", seriesIndex: longest, dataIndex: figure.at });
      }
      setTimeout(() => { const box = figure.place.querySelector(".tip"); if (box) spoken.textContent = [...box.children].map((line) => [...line.children].map((part) => part.textContent).filter(Boolean).join(" ") || line.textContent).join(", "); }, 60);
    } else if (event.key === "Escape") drawn.dispatchAction({ type: "hideTip" });
    else if (event.key === "+" || event.key === "=") zoomBy(id, 0.5);
    else if (event.key === "-") zoomBy(id, 2);
    else if (event.key === "0") zoomTo(id, [0, 100]);
    else return;
    event.preventDefault();
  }

  // ---- saving a figure ----
  function drawSvg(chart, hidden) {
    const ink = readInks("light"), width = chart.kind === "dots" || chart.kind === "heat" ? 960 : 720;
    const made = DRAW[chart.kind](chart, hidden, ink, width), named = chart.series.filter((one) => !hidden.has(one.name) && one.name);
    const legend = chart.kind !== "heat" && named.length > 1, rows = legend ? Math.ceil(named.reduce((sum, one) => sum + one.name.length * 6.5 + 40, 0) / (width - 40)) : 0;
    const top = 44 + (chart.kind === "heat" ? 1 : rows) * 20, height = Math.max(made.height, 300) + top;
    const drawn = echarts.init(null, null, { renderer: "svg", ssr: true, width, height });
    const fontFamily = made.option.textStyle.fontFamily, graphic = [];
    const write = (text, x, y, style = {}) => graphic.push({ type: "text", x, y, style: { text, fontSize: 12, fontFamily, verticalAlign: "top", fill: ink.ink, ...style } });
    const fill = (x, y, width, height, paint) => graphic.push({ type: "rect", shape: { x, y, width, height }, style: { fill: paint } });
    write(chart.title, 14, 14, { fontSize: 15, fontWeight: 600 });
    let x = 14, y = 42;
    if (made.states) chart.scale.names.forEach((name, place) => { fill(x, y + 1, 10, 10, stateInk(place, ink)); write(name, x + 16, y); x += name.length * 6.5 + 34; });
    else if (Number.isFinite(made.low)) {
      const low = show(made.low, chart.scale), from = x + low.length * 7 + 6;
      write(low, x, y);
      range(60).forEach((n) => fill(from + 2 * n, y + 2, 2, 8, ramp(n / 59, ink)));
      write(show(made.high, chart.scale), from + 128, y);
    }
    if (legend) for (const one of named) {
      const wide = one.name.length * 6.5 + 34;
      if (x + wide > width - 14 && x > 14) { x = 14; y += 20; }
      fill(x, y + 4, 14, 4, colour(one.slot, ink));
      write(one.name, x + 20, y);
      x += wide;
    }
    drawn.setOption({ ...made.option, backgroundColor: "#ffffff", graphic, grid: { ...made.option.grid, top: top + 10, outerBounds: { left: 10, right: 14, top: top, bottom: 10 } } });
    const text = drawn.renderToSVGString();
    drawn.dispose();
    return { text, width, height };
  }
  function toCsv(chart) {
    const cell = (value) => { let text = value === null || value === undefined ? "" : String(value); if (typeof value !== "number" && /^\s*[=+\-@＝＋－＠]/.test(text) && !/^-?\d+(\.\d+)?$/.test(text)) text = `'${text}`; return /[",\n\r]/.test(text) ? `"${text.replaceAll('"', '""')}"` : text; };
    const head = (axis) => (axis.unit && !axis.title.includes(axis.unit) ? `${axis.title} (${axis.unit})` : axis.title), raw = (value, axis) => (value !== null && axis.names.length ? axis.names[value] : value);
    const rows = chart.kind === "heat" ? [[head(chart.x), head(chart.y), head(chart.scale) || "state"]] : [["series", head(chart.x), head(chart.y), "low", "high"]];
    for (const one of chart.series) for (const p of one.points) rows.push(chart.kind === "heat" ? [raw(p[0], chart.x), raw(p[1], chart.y), raw(p[2], chart.scale)] : [one.name, raw(p[0], chart.x), raw(p[1], chart.y), p[2] ?? "", p[3] ?? ""]);
    return rows.map((row) => `${row.map(cell).join(",")}\n`).join("");
  }
  async function toPng({ text, width, height }) {
    const image = new Image();
    // An address with the data in it: of a page from a file, a canvas takes an image from nowhere else.
    await new Promise((done, failed) => { image.onload = done; image.onerror = failed; image.src = `data:image/svg+xml;charset=utf-8,${encodeURIComponent(text)}`; });
    const canvas = element("canvas", { width: width * 2, height: height * 2 });
    canvas.getContext("2d").drawImage(image, 0, 0, width * 2, height * 2);
    return new Promise((done) => canvas.toBlob(done, "image/png"));
  }
  async function save(id, form) {
    const { chart, hidden } = figures.get(id);
    const blob = form === "csv" ? new Blob([toCsv(chart)], { type: "text/csv" }) : form === "svg" ? new Blob([drawSvg(chart, hidden).text], { type: "image/svg+xml" }) : await toPng(drawSvg(chart, hidden));
    const link = element("a", { href: URL.createObjectURL(blob), download: `${id}.${form}` });
    link.click();
    setTimeout(() => URL.revokeObjectURL(link.href), 10000);
  }

  // ---- the page around them ----
  function drawAll() { inks = readInks(); held.charts.forEach(setUp); }
  const button = document.getElementById("theme"), prefersDark = matchMedia("(prefers-color-scheme: dark)");
  const isDark = () => (root.dataset.theme ? root.dataset.theme === "dark" : prefersDark.matches);
  const mark = () => button.setAttribute("aria-pressed", String(isDark()));
  button.hidden = false;
  button.addEventListener("click", () => {
    root.dataset.theme = isDark() ? "light" : "dark";
    try { localStorage.setItem("fedloom-theme", root.dataset.theme); } catch { /* no storage: it holds for this visit */ }
    mark();
    drawAll();
  });
  prefersDark.addEventListener("change", () => { mark(); drawAll(); });
  function addCopying() {
    for (const box of document.querySelectorAll(".code:not(:has(button))")) {
      const made = element("button", { type: "button", textContent: "Copy" });
      made.addEventListener("click", async () => { try { await navigator.clipboard.writeText(box.querySelector("pre").textContent); made.textContent = "Copied"; } catch { made.textContent = "Select and copy"; } setTimeout(() => (made.textContent = "Copy"), 1500); });
      box.append(made);
    }
  }
  let wide = innerWidth;
  addEventListener("resize", () => { if (innerWidth !== wide) { wide = innerWidth; figures.forEach(redraw); } });
  // In the pixels of a sheet of A4, where two charts stand side by side.
  function fitToPaper(figure) { figure.drawn.resize({ width: figure.place.closest(".wide") ? 680 : 330 }); figure.drawn.getZr().refreshImmediately(); setBox(figure); }
  let before;
  addEventListener("beforeprint", () => { before = root.dataset.theme; root.dataset.theme = "light"; drawAll(); figures.forEach(fitToPaper); });
  addEventListener("afterprint", () => { before ? (root.dataset.theme = before) : delete root.dataset.theme; drawAll(); });
  function watchSections() {
    const links = new Map([...document.querySelectorAll(".contents a")].map((link) => [link.hash.slice(1), link]));
    const seen = new IntersectionObserver((told) => { for (const one of told) if (one.isIntersecting) links.forEach((link, id) => (id === one.target.id ? link.setAttribute("aria-current", "true") : link.removeAttribute("aria-current"))); }, { rootMargin: "-20% 0px -70% 0px" });
    links.forEach((_, id) => { const target = document.getElementById(id); if (target) seen.observe(target); });
  }

  // ---- live ----
  // What is told anew takes the place of what it was; the rest, with its zoom, open tables and scroll, stays.
  function takeUp(told) {
    document.title = told.title;
    const fresh = new DOMParser().parseFromString(`<main>${told.main}</main>`, "text/html").querySelector("main"), main = document.getElementById("main");
    const outline = (from) => [...from.querySelectorAll("[data-part], [data-chart], section")].map((one) => one.dataset.part || one.dataset.chart || one.id).join(" ");
    held.charts = told.charts;
    if (outline(fresh) !== outline(main)) {
      const open = [...main.querySelectorAll("details[open]")].map((one) => one.closest("figure")?.id || one.id), scroll = scrollY;
      const kept = new Map([...figures].map(([id, one]) => [id, one]));
      main.replaceChildren(...fresh.childNodes);
      for (const one of main.querySelectorAll("details")) one.open = open.includes(one.closest("figure")?.id || one.id);
      drawAll();
      for (const [id, old] of kept) { const now = figures.get(id); if (now && now !== old) { Object.assign(now, { hidden: old.hidden, zoom: old.zoom, at: old.at }); redraw(now); } }
      addCopying();
      watchSections();
      scrollTo(0, scroll);
      return;
    }
    for (const part of fresh.querySelectorAll("[data-part]")) {
      const own = main.querySelector(`[data-part="${CSS.escape(part.dataset.part)}"]`);
      if (own.innerHTML !== part.innerHTML) own.innerHTML = part.innerHTML;
      if (own.className !== part.className) own.className = part.className;
    }
    drawAll();
  }
  async function follow() {
    const line = document.getElementById("connection");
    let wait = POLL_MS;
    try {
      const answer = await fetch("data.json", { cache: "no-cache" });
      if (!answer.ok) throw new Error(answer.statusText);
      const told = await answer.json();
      if (told.version !== held.version) { held.version = told.version; held.state = told.state; takeUp(told); }
      line.textContent = held.state === "running" ? "live" : "";
    } catch { line.textContent = "no answer, trying again"; wait = AWAY_MS; }
    setTimeout(follow, held.state === "running" ? wait : AWAY_MS); // a run may go on, another may begin
  }

  mark();
  drawAll();
  addCopying();
  watchSections();
  if (held.live) setTimeout(follow, POLL_MS);
})();
