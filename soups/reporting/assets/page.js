"use strict";
(() => {
  const data = JSON.parse(document.getElementById("data").textContent);
  const tip = document.getElementById("tip");
  const live = document.getElementById("live");

  // ---- theme -------------------------------------------------------------------------------------------------------
  const root = document.documentElement;
  const themeButton = document.getElementById("theme");
  const system = matchMedia("(prefers-color-scheme: dark)");
  const stored = (value) => {
    try { // a browser may keep no storage for local files
      if (value !== undefined) localStorage.setItem("soups-theme", value);
      return localStorage.getItem("soups-theme");
    } catch { return null; }
  };
  const isDark = () => (root.dataset.theme ? root.dataset.theme === "dark" : system.matches);
  const showTheme = () => {
    themeButton.setAttribute("aria-pressed", String(isDark()));
    themeButton.textContent = isDark() ? "Light" : "Dark";
    themeButton.setAttribute("aria-label", "Dark theme");
  };
  if (["light", "dark"].includes(stored())) root.dataset.theme = stored();
  showTheme();
  system.addEventListener("change", showTheme);
  themeButton.addEventListener("click", () => {
    root.dataset.theme = isDark() ? "light" : "dark";
    stored(root.dataset.theme);
    showTheme();
  });

  // ---- tables ------------------------------------------------------------------------------------------------------
  for (const table of document.querySelectorAll("table.data")) {
    const body = table.tBodies[0];
    const original = [...body.rows];
    const heads = [...table.tHead.rows[0].cells];
    heads.forEach((head, column) => {
      head.querySelector("button").addEventListener("click", () => {
        const numeric = head.classList.contains("number");
        const order = numeric ? ["descending", "ascending", "none"] : ["ascending", "descending", "none"];
        const wanted = order[(order.indexOf(head.getAttribute("aria-sort")) + 1) % 3];
        heads.forEach((other) => other.setAttribute("aria-sort", "none"));
        head.setAttribute("aria-sort", wanted);
        const sign = wanted === "ascending" ? 1 : -1;
        const key = (row) => row.cells[column].dataset.sort;
        const compare = (one, other) => {
          const a = key(one), b = key(other);
          if (a === "" || b === "") return (a === "") - (b === ""); // empty cells stay last
          return sign * (numeric ? Number(a) - Number(b) : a.localeCompare(b, "en", { numeric: true }));
        };
        body.append(...(wanted === "none" ? original : [...original].sort(compare)));
        const what = head.querySelector("span").textContent || "first column";
        live.textContent = wanted === "none" ? "Original order" : `Sorted by ${what}, ${wanted}`;
      });
    });
  }

  // ---- drawing -----------------------------------------------------------------------------------------------------
  const make = (name, attributes = {}, ...children) => {
    const node = document.createElementNS("http://www.w3.org/2000/svg", name);
    for (const [key, value] of Object.entries(attributes)) node.setAttribute(key, value);
    node.append(...children);
    return node;
  };
  const html = (name, text = "", cls = "") => {
    const node = document.createElement(name);
    if (text !== "") node.textContent = text;
    if (cls) node.className = cls;
    return node;
  };
  const format = (value) => {
    if (value === null || value === undefined) return "–";
    const size = Math.abs(value);
    const text = size && (size >= 1e6 || size < 1e-3) ? value.toExponential(2) : String(Number(value.toPrecision(5)));
    return text.replace("-", "−");
  };
  const withUnit = (value, label) => (/, %$/.test(label) && value !== null ? `${value.toFixed(2).replace("-", "−")} %` : format(value));
  const extent = (values) => values.reduce(([a, b], v) => [Math.min(a, v), Math.max(b, v)], [Infinity, -Infinity]);
  const padded = ([low, high], share = 0.07) => {
    const margin = high > low ? share * (high - low) : Math.abs(high) * 0.05 || 1;
    return [low - margin, high + margin];
  };
  const ticks = ([low, high], count, whole = false) => {
    const raw = Math.max((high - low) / Math.max(1, count), whole ? 1 : 0);
    const power = 10 ** Math.floor(Math.log10(raw));
    const step = [1, 2, 2.5, 5, 10].map((f) => f * power).find((s) => s >= raw * 0.999);
    const digits = Math.max(0, Math.ceil(-Math.log10(step)) + (step / power === 2.5 ? 1 : 0));
    const found = [];
    for (let k = Math.ceil(low / step - 1e-9); k * step <= high + step * 1e-9; k++) {
      found.push([k * step, (k * step).toFixed(digits).replace("-", "−").replace(/^−(0\.?0*)$/, "$1")]);
    }
    return found;
  };
  const logTicks = ([low, high]) => {
    const found = [];
    const decades = Math.log10(high / low);
    for (let p = Math.floor(Math.log10(low)); p <= Math.ceil(Math.log10(high)); p++) {
      for (const f of decades > 3 ? [1] : [1, 2, 5]) {
        const v = f * 10 ** p;
        if (v >= low * 0.999 && v <= high * 1.001) found.push([v, format(v)]);
      }
    }
    return found;
  };
  const shapes = {
    circle: (r) => `M${r},0A${r},${r} 0 1 1 ${-r},0A${r},${r} 0 1 1 ${r},0Z`,
    square: (r) => `M${-r * 0.9},${-r * 0.9}h${r * 1.8}v${r * 1.8}h${-r * 1.8}Z`,
    diamond: (r) => `M0,${-r * 1.3}L${r * 1.3},0L0,${r * 1.3}L${-r * 1.3},0Z`,
    triangle: (r) => `M0,${-r * 1.25}L${r * 1.2},${r * 0.9}H${-r * 1.2}Z`,
    down: (r) => `M0,${r * 1.25}L${r * 1.2},${-r * 0.9}H${-r * 1.2}Z`,
    plus: (r) => `M${-r * 0.4},${-r * 1.2}h${r * 0.8}v${r * 0.8}h${r * 0.8}v${r * 0.8}h${-r * 0.8}v${r * 0.8}h${-r * 0.8}v${-r * 0.8}h${-r * 0.8}v${-r * 0.8}h${r * 0.8}Z`,
    star: (r) => `M${[...Array(10).keys()].map((k) => {
      const radius = (k % 2 ? 0.62 : 1.55) * r, angle = (Math.PI * k) / 5 - Math.PI / 2;
      return `${(radius * Math.cos(angle)).toFixed(2)},${(radius * Math.sin(angle)).toFixed(2)}`;
    }).join("L")}Z`,
    cross: (r) => `M${-r},${-r}L${r},${r}M${-r},${r}L${r},${-r}`,
  };
  // Colour is never alone: each group has a shape of its own, each line a dash pattern once colours repeat.
  const looks = [
    { shape: "circle", colour: 0, r: 5 }, { shape: "circle", colour: 0, r: 5, hollow: true },
    { shape: "diamond", colour: 4, r: 6.5, hollow: true }, { shape: "star", colour: 1, r: 7 },
    { shape: "triangle", colour: 2, r: 6 }, { shape: "plus", colour: 3, r: 6 }, { shape: "square", colour: 6, r: 5 },
    { shape: "down", colour: 5, r: 6 }, { shape: "diamond", colour: 7, r: 5 }, { shape: "triangle", colour: 3, r: 6, hollow: true },
    { shape: "square", colour: 2, r: 5, hollow: true }, { shape: "down", colour: 1, r: 6, hollow: true },
  ];
  const mark = (look, scale = 1) => {
    const line = look.shape === "cross", colour = `var(--c${look.colour})`;
    return make("path", {
      d: shapes[look.shape](look.r * scale), fill: line || look.hollow ? "var(--paper)" : colour,
      "fill-opacity": look.hollow ? 0.001 : 1, stroke: look.hollow || line ? colour : "var(--paper)",
      "stroke-width": look.hollow || line ? 1.9 : 1,
    });
  };
  const dashes = ["", "7 4", "2 3", "9 3 2 3"];
  const textWidth = (text, size = 12) => text.length * size * 0.56;
  // Long names are cut in their middle: tensors and runs differ at their ends.
  const middle = (text, most) => {
    if (text.length <= most) return text;
    const end = Math.floor((most - 1) / 2);
    return `${text.slice(0, most - 1 - end)}…${text.slice(text.length - end)}`;
  };
  // Labels of one axis that would look alike when they are cut lose what they have in common first.
  const shortened = (labels, most) => {
    const cut = labels.map((label) => middle(label, most));
    if (new Set(cut).size === new Set(labels).size) return cut;
    let start = 0, end = 0;
    const least = Math.min(...labels.map((label) => label.length));
    while (start < least && labels.every((label) => label[start] === labels[0][start])) start++;
    while (end < least - start && labels.every((label) => label[label.length - 1 - end] === labels[0][labels[0].length - 1 - end])) end++;
    return labels.map((label) => middle(`${start ? "…" : ""}${label.slice(start, label.length - end)}${end ? "…" : ""}`, most));
  };
  const fitted = (text, width) => middle(text, Math.max(8, Math.floor(width / (12 * 0.56))));

  const measure = (plot) => Math.max(260, Math.round(plot.clientWidth) || 560);
  const base = (plot, width, height, label) => {
    const svg = make("svg", { viewBox: `0 0 ${width} ${height}`, width, height, role: "img", "aria-label": label });
    plot.replaceChildren(svg);
    return svg;
  };

  // Axes with a grid; returns functions from values to pixels.
  const frame = (svg, width, height, xs, ys, labels, options = {}) => {
    const yTicks = ticks(ys, height < 300 ? 4 : 6);
    const left = Math.max(...yTicks.map(([, text]) => textWidth(text))) + 14;
    const box = { left, right: width - 12, top: 24, bottom: height - (options.bottom ?? 44) };
    const unit = options.log ? Math.log10 : (v) => v;
    const x = (v) => box.left + ((unit(v) - unit(xs[0])) / (unit(xs[1]) - unit(xs[0]))) * (box.right - box.left);
    const y = (v) => box.bottom - ((v - ys[0]) / (ys[1] - ys[0])) * (box.bottom - box.top);
    for (const [value, text] of yTicks) {
      svg.append(make("line", { x1: box.left, x2: box.right, y1: y(value), y2: y(value), class: "grid" }));
      svg.append(make("text", { x: box.left - 8, y: y(value) + 4, "text-anchor": "end" }, text));
    }
    if (!options.noX) {
      let last = -Infinity;
      for (const [value, text] of options.log ? logTicks(xs) : ticks(xs, (box.right - box.left) / 80, options.whole)) {
        svg.append(make("line", { x1: x(value), x2: x(value), y1: box.bottom, y2: box.bottom + 4, class: "axis" }));
        if (x(value) - last < textWidth(text) + 6) continue;
        last = x(value);
        svg.append(make("text", { x: x(value), y: box.bottom + 18, "text-anchor": "middle" }, text));
      }
    }
    svg.append(make("line", { x1: box.left, x2: box.right, y1: box.bottom, y2: box.bottom, class: "axis" }));
    svg.append(make("text", { x: 0, y: 12, class: "label" }, fitted(labels[1], width)));
    svg.append(make("text", { x: box.right, y: height - 6, "text-anchor": "end", class: "label" }, fitted(labels[0], width)));
    return { x, y, box };
  };

  // ---- what the pointer or the arrow keys are on -------------------------------------------------------------------
  const showTip = (title, rows, left, top) => {
    tip.replaceChildren(html("strong", title));
    if (rows.length) {
      const table = html("table");
      for (const [name, value] of rows) {
        const row = table.insertRow();
        row.append(html("td", name), html("td", value));
      }
      tip.append(table);
    }
    tip.hidden = false;
    const size = tip.getBoundingClientRect();
    const x = left + 14 + size.width > innerWidth - 8 ? left - 14 - size.width : left + 14;
    tip.style.left = `${Math.max(8, x)}px`;
    tip.style.top = `${Math.min(Math.max(8, top - size.height / 2), innerHeight - size.height - 8)}px`;
  };
  const hideTip = () => { tip.hidden = true; };

  /* One tab stop a figure; the arrow keys move inside it.
     items: {x, y, title, rows}; nearest(px, py) gives an item's number or -1; move(number, key) the next number. */
  const interact = (plot, view, label) => {
    plot.view = view; // replaced at each redraw; the listeners stay
    if (plot.ready) return;
    plot.ready = true;
    plot.tabIndex = 0;
    plot.setAttribute("role", "group");
    plot.setAttribute("aria-label", `${label}. Arrow keys move through the values.`);
    let at = -1;
    const show = (number, speak) => {
      at = number;
      const { svg, items, mark: marking } = plot.view;
      svg.querySelector(".marking")?.remove();
      if (at < 0 || !items[at]) { hideTip(); return; }
      const item = items[at], rect = svg.getBoundingClientRect(), zoom = rect.width / svg.viewBox.baseVal.width;
      const group = make("g", { class: "marking" });
      marking(group, item);
      svg.append(group);
      showTip(item.title, item.rows, rect.left + item.x * zoom, rect.top + item.y * zoom);
      if (speak) live.textContent = [item.title, ...item.rows.map((row) => row.join(" "))].join(", ");
    };
    plot.addEventListener("pointermove", (event) => {
      const { svg, nearest } = plot.view;
      const rect = svg.getBoundingClientRect(), zoom = svg.viewBox.baseVal.width / rect.width;
      const found = nearest((event.clientX - rect.left) * zoom, (event.clientY - rect.top) * zoom);
      if (found !== at || found < 0) show(found, false);
    });
    plot.addEventListener("pointerleave", () => show(-1));
    plot.addEventListener("blur", () => show(-1));
    plot.addEventListener("focus", () => { if (plot.matches(":focus-visible") && plot.view.items.length) show(0, true); });
    plot.addEventListener("keydown", (event) => {
      const { items, move } = plot.view;
      if (event.key === "Escape") { show(-1); return; }
      const keys = { ArrowRight: 1, ArrowDown: 1, ArrowLeft: 1, ArrowUp: 1, Home: 1, End: 1 };
      if (!keys[event.key] || !items.length) return;
      event.preventDefault();
      if (event.key === "Home") show(0, true);
      else if (event.key === "End") show(items.length - 1, true);
      else show(at < 0 ? 0 : Math.min(items.length - 1, Math.max(0, move(at, event.key))), true);
    });
  };
  const ring = (radius) => (group, item) => group.append(make("circle", { cx: item.x, cy: item.y, r: radius, class: "ring" }));
  const byDistance = (items, reach) => (px, py) => {
    let best = -1, least = reach;
    items.forEach((item, number) => {
      const distance = Math.hypot(item.x - px, item.y - py);
      if (distance < least) { best = number; least = distance; }
    });
    return best;
  };
  const inOrder = (at, key) => at + (key === "ArrowRight" || key === "ArrowUp" ? 1 : -1);

  const legend = (section, entries, hidden, redraw) => {
    const place = section.querySelector(".legend");
    if (place.childElementCount) return;
    for (const [name, swatch] of entries) {
      const button = html("button");
      button.type = "button";
      const svg = make("svg", { viewBox: "-11 -7 22 14", "aria-hidden": "true" });
      svg.append(...swatch);
      button.append(svg, name);
      if (hidden && entries.length > 1) {
        button.setAttribute("aria-pressed", "true");
        button.addEventListener("click", () => {
          if (hidden.has(name)) hidden.delete(name); else hidden.add(name);
          button.setAttribute("aria-pressed", String(!hidden.has(name)));
          redraw();
        });
      } else {
        const plain = html("span", "", "key");
        plain.append(svg, name);
        place.append(plain);
        continue;
      }
      place.append(button);
    }
  };

  // ---- kinds of figures --------------------------------------------------------------------------------------------
  const drawers = {
    scatter(part, section, plot, state, redraw) {
      const names = Object.keys(part.groups);
      const look = Object.fromEntries(names.map((name, k) => [name, looks[k % looks.length]]));
      legend(section, names.map((name) => [name, [mark(look[name], 0.95)]]), state.hidden, redraw);
      const shown = names.filter((name) => !state.hidden.has(name));
      const all = shown.flatMap((group) => part.groups[group].map((point) => ({ group, ...point })))
        .filter((point) => point.x !== null && point.y !== null);
      // One point far from the others would squeeze them into a corner: it is named below the frame instead.
      const far = state.whole ? [] : outliers(all);
      const points = all.filter((point) => !far.includes(point));
      const width = measure(plot), height = Math.round(Math.min(430, Math.max(300, width * 0.68)));
      const svg = base(plot, width, height, `${part.title}: ${part.y_label} against ${part.x_label}`);
      let below = section.querySelector(".outside");
      below?.remove(); section.querySelector(".reset")?.remove();
      if (!points.length) { interact(plot, { svg, items: [], nearest: () => -1, move: inOrder, mark: ring(11) }, part.title); return; }
      const xs = padded(extent(points.map((p) => p.x))), ys = padded(extent(points.map((p) => p.y)));
      const { x, y } = frame(svg, width, height, xs, ys, [part.x_label, part.y_label]);
      for (const name of part.connect.filter((n) => shown.includes(n))) {
        const line = points.filter((p) => p.group === name).map((p) => `${x(p.x)},${y(p.y)}`).join(" ");
        svg.append(make("polyline", { points: line, fill: "none", stroke: `var(--c${look[name].colour})`, "stroke-width": 1.5, "stroke-opacity": 0.7 }));
      }
      const items = points.map((point) => {
        const node = mark(look[point.group]);
        node.setAttribute("transform", `translate(${x(point.x)},${y(point.y)})`);
        svg.append(node);
        const rows = [[part.x_label.replace(/, %$/, ""), withUnit(point.x, part.x_label)], [part.y_label.replace(/, %$/, ""), withUnit(point.y, part.y_label)]];
        const title = point.name === point.group ? point.name : `${point.name} · ${point.group}`;
        return { x: x(point.x), y: y(point.y), title, rows: [...rows, ...Object.entries(point.details)] };
      }).sort((a, b) => a.x - b.x);
      interact(plot, { svg, items, nearest: byDistance(items, 28), move: inOrder, mark: ring(11) }, part.title);
      if (far.length || state.whole) {
        if (far.length) {
          below = html("p", `Outside the frame: ${far.map((p) => `${p.name} (${withUnit(p.x, part.x_label)}, ${withUnit(p.y, part.y_label)})`).join("; ")}.`, "outside");
          plot.after(below);
        }
        const button = html("button", far.length ? "Show all points" : "Zoom in", "reset");
        button.type = "button";
        button.addEventListener("click", () => { state.whole = !state.whole; redraw(); section.querySelector(".reset")?.focus(); });
        (below && below.isConnected ? below : plot).after(button);
      }
    },

    curves(part, section, plot, state, redraw) {
      const order = [0, 1, 2, 3, 5, 7, 6, 4]; // the two blues far apart
      const names = Object.keys(part.series);
      const look = Object.fromEntries(names.map((name, k) => [name, { colour: order[k % 8], dash: dashes[Math.floor(k / 8) % 4] }]));
      const stroke = (name) => ({ fill: "none", stroke: `var(--c${look[name].colour})`, "stroke-width": 2, "stroke-dasharray": look[name].dash, "stroke-linejoin": "round" });
      legend(section, names.map((name) => [name, [make("line", { x1: -11, x2: 11, y1: 0, y2: 0, ...stroke(name) })]]), state.hidden, redraw);
      const shown = names.filter((name) => !state.hidden.has(name));
      const width = measure(plot), height = Math.round(Math.min(400, Math.max(280, width * 0.6)));
      const svg = base(plot, width, height, `${part.title}: ${part.y_label} over ${part.x_label}`);
      const have = (v) => v !== null && v !== undefined;
      const values = shown.flatMap((name) => [part.series[name], part.low[name] ?? [], part.high[name] ?? []]).flat().filter(have);
      if (!values.length) { interact(plot, { svg, items: [], nearest: () => -1, move: inOrder, mark: () => {} }, part.title); return; }
      const used = part.x.filter((_, k) => shown.some((name) => have(part.series[name][k])));
      const span = extent(used);
      const xs = part.log_x ? (span[0] < span[1] ? span : [span[0] / 2, span[0] * 2]) : span[0] < span[1] ? span : padded(span);
      const { x, y, box } = frame(svg, width, height, xs, padded(extent(values)), [part.x_label, part.y_label], { log: part.log_x, whole: used.every(Number.isInteger) });
      const path = (list) => list.filter(([, v]) => have(v)).map(([px, v], k) => `${k ? "L" : "M"}${x(px).toFixed(1)},${y(v).toFixed(1)}`).join("");
      for (const name of shown) {
        if (!part.low[name] || !part.high[name]) continue;
        const up = part.x.map((px, k) => [px, part.high[name][k]]).filter(([, v]) => have(v));
        const down = part.x.map((px, k) => [px, part.low[name][k]]).filter(([, v]) => have(v)).reverse();
        if (up.length > 1) svg.append(make("path", { d: `${path(up)}L${path(down).slice(1)}Z`, fill: `var(--c${look[name].colour})`, "fill-opacity": 0.15 }));
      }
      for (const name of shown) {
        const points = part.x.map((px, k) => [px, part.series[name][k]]).filter(([, v]) => have(v));
        svg.append(make("path", { d: path(points), ...stroke(name) }));
        if (points.length <= 24) for (const [px, v] of points) svg.append(make("circle", { cx: x(px), cy: y(v), r: 2.6, fill: `var(--c${look[name].colour})` }));
      }
      const items = part.x.map((px, k) => ({ px, k })).filter(({ k }) => shown.some((name) => have(part.series[name][k])))
        .sort((a, b) => a.px - b.px).map(({ px, k }) => ({
          x: x(px), y: box.top + 40, title: `${part.x_label} ${format(px)}`,
          marks: shown.filter((name) => have(part.series[name][k])).map((name) => [name, y(part.series[name][k])]),
          rows: shown.filter((name) => have(part.series[name][k])).sort((a, b) => part.series[b][k] - part.series[a][k]).map((name) => {
            const low = part.low[name]?.[k], high = part.high[name]?.[k];
            return [name, withUnit(part.series[name][k], part.y_label) + (have(low) && have(high) ? ` (${format(low)} to ${format(high)})` : "")];
          }),
        }));
      const nearest = (px, py) => {
        if (px < box.left - 10 || px > box.right + 10 || py < 0 || py > height) return -1;
        return items.reduce((best, item, k) => (best < 0 || Math.abs(item.x - px) < Math.abs(items[best].x - px) ? k : best), -1);
      };
      const marking = (group, item) => {
        group.append(make("line", { x1: item.x, x2: item.x, y1: box.top, y2: box.bottom, class: "cross" }));
        for (const [name, py] of item.marks) group.append(make("circle", { cx: item.x, cy: py, r: 4.5, fill: `var(--c${look[name].colour})`, stroke: "var(--paper)", "stroke-width": 1.5 }));
      };
      interact(plot, { svg, items, nearest, move: inOrder, mark: marking }, part.title);
    },

    steps(part, section, plot) {
      const kept = { shape: "triangle", colour: 1, r: 6 }, left = { shape: "cross", colour: 6, r: 4.2 };
      const line = { stroke: "var(--c1)", "stroke-width": 2, fill: "none" };
      legend(section, [
        ["best so far", [make("line", { x1: -11, x2: 11, y1: 0, y2: 0, ...line })]],
        ["kept", [mark(kept, 0.9)]], ["left out", [mark(left)]],
      ], null, null);
      const count = part.names.length;
      const width = measure(plot), longest = Math.min(14, Math.max(0, ...part.names.map((n) => n.length)));
      const slot = (width - 70) / Math.max(1, count);
      const upright = slot > textWidth("x".repeat(longest)) + 8;
      const bottom = (upright ? 26 : 16 + longest * 5.2) + 22;
      const height = Math.round(Math.min(430, Math.max(280, width * 0.6)) + (upright ? 0 : 24));
      const svg = base(plot, width, height, `${part.title}: ${part.score_label} as candidates are tried`);
      const best = [];
      part.scores.forEach((score, k) => best.push(part.kept[k] || !k ? score : best[k - 1]));
      const ys = padded(extent([...part.scores, ...best].filter((v) => v !== null)));
      const { y, box } = frame(svg, width, height, [0, count], ys, ["candidates in the order they were tried", part.score_label], { noX: true, bottom });
      const x = (k) => box.left + ((k + 0.5) / count) * (box.right - box.left);
      const each = Math.ceil(count / Math.max(1, Math.floor((box.right - box.left) / 18)));
      const names = shortened(part.names, 14);
      const items = part.names.map((name, k) => {
        if (k % each === 0) {
          const short = names[k];
          const place = upright ? { x: x(k), y: box.bottom + 18, "text-anchor": "middle" }
            : { x: 0, y: 0, "text-anchor": "end", transform: `translate(${x(k) + 4},${box.bottom + 12}) rotate(-45)` };
          svg.append(make("text", place, short));
        }
        const rows = [[part.score_label.replace(/, %$/, ""), withUnit(part.scores[k], part.score_label)]];
        if (part.to_reach[k] !== null) rows.push(["to reach", withUnit(part.to_reach[k], part.score_label)]);
        rows.push(["decision", part.kept[k] ? "kept" : "left out"]);
        return { x: x(k), y: y(part.scores[k]), title: `${k + 1}. ${name}`, rows };
      });
      let d = "";
      best.forEach((value, k) => { d += k ? `H${x(k)}V${y(value)}` : `M${x(0)},${y(value)}`; });
      svg.append(make("path", { d: `${d}H${box.right}`, ...line }));
      items.forEach((item, k) => {
        const node = mark(part.kept[k] ? kept : left);
        node.setAttribute("transform", `translate(${item.x},${item.y})`);
        svg.append(node);
      });
      const nearest = (px, py) => (px < box.left || px > box.right || py < 0 ? -1 : Math.min(count - 1, Math.max(0, Math.floor(((px - box.left) / (box.right - box.left)) * count))));
      interact(plot, { svg, items, nearest, move: inOrder, mark: ring(11) }, part.title);
    },

    matrix(part, section, plot) {
      const rows = part.row_labels.length, columns = part.column_labels.length;
      const square = rows === columns && part.row_labels.every((label, k) => label === part.column_labels[k]);
      const width = measure(plot), longest = (labels) => Math.max(0, ...labels.map((l) => l.length));
      const rowNames = shortened(part.row_labels, 16), columnNames = shortened(part.column_labels, 16);
      const left = Math.min(width * 0.35, longest(rowNames) * 7.6 + 12);
      const most = rows > 14 ? 22 : 54, headings = longest(columnNames);
      const upright = Math.min(most, (width - left - 8) / columns) > headings * 7.6 + 4;
      const top = upright ? 22 : headings * 5.4 + 16;
      // A slanted heading ends to the right of its column: the last one needs room there.
      const overhang = upright ? 8 : headings * 5.4 + 8;
      const size = Math.min(most, (width - left - overhang) / columns);
      const height = Math.round(top + rows * size + 46);
      const svg = base(plot, width, height, `${part.title}: ${part.value_label}`);
      // A thing compared with itself says nothing: the diagonal is left out of the colour scale.
      const counted = part.values.flatMap((row, i) => row.filter((v, j) => v !== null && !(square && i === j)));
      const [low, high] = counted.length ? extent(counted) : [0, 1];
      const every = Math.max(1, Math.ceil(12 / size));
      // With room for some headings only, the last is one of them.
      const named = (j, count) => j === count - 1 || (j % every === 0 && count - 1 - j >= every);
      part.column_labels.forEach((_, j) => {
        if (!named(j, columns)) return;
        const px = left + (j + 0.5) * size;
        const place = upright ? { x: px, y: top - 8, "text-anchor": "middle" } : { x: 0, y: 0, transform: `translate(${px + 3},${top - 6}) rotate(-45)` };
        svg.append(make("text", place, columnNames[j]));
      });
      const items = [];
      part.values.forEach((row, i) => {
        if (named(i, rows)) svg.append(make("text", { x: left - 8, y: top + (i + 0.5) * size + 4, "text-anchor": "end" }, rowNames[i]));
        row.forEach((value, j) => {
          const self = square && i === j;
          const share = value === null ? 0 : high > low ? (value - low) / (high - low) : 0.5;
          const fill = value === null || self ? "var(--raised)" : colourOf(share);
          const px = left + j * size, py = top + i * size, gap = size > 12 ? 1 : 0;
          svg.append(make("rect", { x: px, y: py, width: Math.max(0.5, size - gap), height: Math.max(0.5, size - gap), fill }));
          const written = value === null ? "" : brief(value, high - low);
          if (!self && size >= 30 && textWidth(written, 11) < size - 4) {
            const node = make("text", { x: px + size / 2, y: py + size / 2 + 4, "text-anchor": "middle" }, written);
            node.style.fill = share > 0.55 ? "#101418" : "#ffffff";
            node.style.fontSize = "11px";
            svg.append(node);
          }
          const title = square && !self ? `${part.row_labels[i]} and ${part.column_labels[j]}` : self ? part.row_labels[i] : `${part.row_labels[i]}, ${part.column_labels[j]}`;
          items.push({ x: px + size / 2, y: py + size / 2, px, py, title, rows: [[(part.value_label || "value").replace(/, %$/, ""), withUnit(value, part.value_label)]] });
        });
      });
      const bar = Math.min(160, width - left - 90), base_ = top + rows * size + 16;
      for (let k = 0; k < 40; k++) svg.append(make("rect", { x: left + (k * bar) / 40, y: base_, width: bar / 40 + 0.5, height: 8, fill: colourOf((k + 0.5) / 40) }));
      svg.append(make("text", { x: left, y: base_ + 22 }, format(low)));
      svg.append(make("text", { x: left + bar, y: base_ + 22, "text-anchor": "end" }, format(high)));
      svg.append(make("text", { x: left + bar + 10, y: base_ + 8, class: "label" }, textWidth(part.value_label) < width - left - bar - 10 ? part.value_label : ""));
      const nearest = (px, py) => {
        const j = Math.floor((px - left) / size), i = Math.floor((py - top) / size);
        return i >= 0 && j >= 0 && i < rows && j < columns ? i * columns + j : -1;
      };
      const move = (at, key) => {
        const i = Math.floor(at / columns), j = at % columns;
        const [di, dj] = { ArrowUp: [-1, 0], ArrowDown: [1, 0], ArrowLeft: [0, -1], ArrowRight: [0, 1] }[key];
        return Math.min(rows - 1, Math.max(0, i + di)) * columns + Math.min(columns - 1, Math.max(0, j + dj));
      };
      const marking = (group, item) => group.append(make("rect", { x: item.px, y: item.py, width: size - 1, height: size - 1, class: "ring" }));
      interact(plot, { svg, items, nearest, move, mark: marking }, part.title);
    },
  };

  const outliers = (points) => {
    if (points.length < 4) return [];
    const away = (key) => {
      const sorted = points.map((p) => p[key]).sort((a, b) => a - b), n = sorted.length;
      const at = (q) => sorted[Math.min(n - 1, Math.floor(q * n))];
      const spread = Math.max(at(0.85) - at(0.2), 1e-12);
      return (p) => p[key] < at(0.2) - 2.5 * spread || p[key] > at(0.85) + 2.5 * spread;
    };
    const one = away("x"), other = away("y");
    const far = points.filter((p) => one(p) || other(p));
    return far.length <= Math.max(1, points.length / 5) ? far : [];
  };
  // Viridis: even in lightness, told apart by every kind of colour vision and in grey.
  const stops = ["440154", "482878", "3e4989", "31688e", "26828e", "1f9e89", "35b779", "6ece58", "b5de2b", "fde725"]
    .map((text) => [0, 2, 4].map((k) => parseInt(text.slice(k, k + 2), 16)));
  const colourOf = (share) => {
    const place = Math.min(0.999, Math.max(0, share)) * (stops.length - 1), k = Math.floor(place);
    return `rgb(${stops[k].map((from, c) => Math.round(from + (stops[k + 1][c] - from) * (place - k))).join(",")})`;
  };
  const brief = (value, range) => {
    const size = Math.abs(value);
    if (size && (size >= 1e4 || size < 1e-3)) return value.toExponential(0).replace("-", "−");
    const digits = Math.min(4, Math.max(0, 2 - Math.floor(Math.log10(range || size || 1))));
    return value.toFixed(Math.min(digits, size >= 100 ? 0 : size >= 10 ? 1 : 3)).replace("-", "−");
  };

  for (const part of data.figures) {
    const section = document.getElementById(part.id), plot = section.querySelector(".plot");
    const state = { hidden: new Set(), whole: false };
    const redraw = () => drawers[part.kind](part, section, plot, state, redraw);
    let width = 0;
    new ResizeObserver(() => {
      if (plot.clientWidth !== width) { width = plot.clientWidth; hideTip(); redraw(); }
    }).observe(plot);
    redraw();
  }
  addEventListener("scroll", hideTip, { passive: true });
})();
