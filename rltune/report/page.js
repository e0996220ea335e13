"use strict";
(() => {
  const data = JSON.parse(document.getElementById("data").textContent);
  const byId = (id) => document.getElementById(id);
  const SVG = "http://www.w3.org/2000/svg";

  function make(name, attributes = {}, ...children) {
    const node = document.createElement(name);
    for (const [key, value] of Object.entries(attributes)) node.setAttribute(key, value);
    node.append(...children);
    return node;
  }

  function draw(name, attributes, text) {
    const node = document.createElementNS(SVG, name);
    for (const [key, value] of Object.entries(attributes)) node.setAttribute(key, value);
    if (text !== undefined) node.textContent = text;
    return node;
  }

  const ids = Object.keys(data.trials).sort((a, b) => a.length - b.length || (a < b ? -1 : 1));
  const number = (value) => (value === null ? "" : String(Number(value.toPrecision(4))));
  const signed = (value) => (value === null ? "" : (value > 0 ? "+" : "") + number(value));
  const titleOf = (id) => (id === "000" ? "base model" : "trial " + id);

  function gainOf(trial, i) {
    const half = trial.halves[i], gain = trial.gains[i];
    if (!half) return signed(gain);
    const decimals = Math.max(1 - Math.floor(Math.log10(half)), 0);
    return (gain > 0 ? "+" : "") + gain.toFixed(decimals) + " \u00b1 " + half.toFixed(decimals);
  }

  // ---- a trial

  function show(id, isAsked) {
    const trial = data.trials[id];
    if (!trial) return;
    for (const node of document.querySelectorAll(".on")) node.classList.remove("on");
    for (const node of document.querySelectorAll("[data-t]"))
      if (node.dataset.t === id) node.classList.add("on");
    const panel = byId("trial");
    panel.dataset.shown = id;
    byId("which").value = id;
    byId("notes").replaceChildren(...trial.notes.map((note) => make("span", {}, note)));
    byId("pictures").replaceChildren(...pictures(id));
    byId("numbers").replaceChildren(numbers(trial, id));
    byId("settings").replaceChildren(settings(trial));
    byId("curves").replaceChildren(...curves(id));
    byId("export").replaceChildren(
      id === "000" ? "" : make("pre", { class: "command" }, data.export + " " + id));
    if (isAsked) {
      history.replaceState(null, "", "#trial-" + id);
      const box = panel.getBoundingClientRect();
      if (box.top > innerHeight * 0.7 || box.bottom < 80) panel.scrollIntoView({ behavior: "smooth" });
    }
  }

  function pictures(id) {
    const { grid, sheets } = data;
    if (!sheets[id] || !sheets["000"]) {
      const why = sheets[id] || id === "000" ? "The base model's grid is not there." :
        "No picture of this trial is in this page; see its folder, trials/" + id + "/samples.";
      return [make("p", { class: "dim" }, why)];
    }
    const found = [];
    for (let i = 0; i < grid.count; i++) {
      const prompt = make("p", { title: "Click for all of it" }, grid.prompts[i] ?? "");
      prompt.addEventListener("click", () => prompt.classList.toggle("open"));
      const sides = id === "000" ? ["000"] : ["000", id];
      const pair = make("div", { class: "pair" }, ...sides.map((side) => tilesOf(side, i)));
      found.push(make("div", { class: "prompt" }, prompt, pair));
    }
    return found;
  }

  const ratios = {};
  function tilesOf(id, prompt) {
    const { each, columns, rows, given } = data.grid;
    const tiles = make("div", { class: "tiles" });
    tiles.style.setProperty("--sheet", `url(${data.sheets[id]})`);
    for (let j = 0; j < each; j++) {
      const place = prompt * each + j;
      const across = columns > 1 ? (place % columns) / (columns - 1) : 0;
      const down = rows > 1 ? Math.floor(place / columns) / (rows - 1) : 0;
      const what = given && j === 0 ? "what was given" : titleOf(id) + ", image " + (j + 1);
      const tile = make("div", { class: "tile", role: "img", "aria-label": what });
      tile.style.backgroundSize = `${columns * 100}% ${rows * 100}%`;
      tile.style.backgroundPosition = `${across * 100}% ${down * 100}%`;
      tiles.append(tile);
    }
    if (ratios[id]) tiles.style.setProperty("--ratio", ratios[id]);
    else {
      const image = new Image();
      image.onload = () => {
        ratios[id] = image.naturalWidth / columns / (image.naturalHeight / rows);
        for (const node of document.querySelectorAll(".tiles[data-of='" + CSS.escape(id) + "']"))
          node.style.setProperty("--ratio", ratios[id]);
      };
      image.src = data.sheets[id];
    }
    tiles.dataset.of = id;
    return make("figure", {}, make("figcaption", {}, titleOf(id)), tiles);
  }

  function numbers(trial, id) {
    const table = make("table");
    table.append(make("tr", {}, ...["", "score", "gain over base"].map((text) => make("th", {}, text))));
    data.names.forEach((name, i) => {
      if (trial.scores[i] === null) return;
      const gain = id === "000" ? "" : gainOf(trial, i);
      table.append(make("tr", {}, make("td", { class: "text" }, name),
        make("td", {}, number(trial.scores[i])), make("td", {}, gain)));
    });
    return table;
  }

  function settings(trial) {
    const table = make("table");
    data.settings.forEach((name, i) => {
      if (trial.values[i] === "") return;
      const label = make("td", { class: "text", title: data.paths[i] }, name);
      table.append(make("tr", {}, label, make("td", { class: "text" }, trial.values[i])));
    });
    return table;
  }

  // ---- curves

  function curves(id) {
    const curve = data.curves[id];
    if (!curve) return [];
    const lines = [];
    if (curve.train[0].length > 1)
      lines.push(plot("reward in training", [{ name: "", x: curve.train[0], y: curve.train[1] }]));
    const gains = data.names.map((name, i) => ({
      name, x: [0, ...curve.steps], y: [0, ...curve.gains[i].map((v) => (v === null ? null : v / data.units[i]))],
    })).filter((line) => line.y.slice(1).some((v) => v !== null));
    if (curve.steps.length && gains.length)
      lines.push(plot("gain at evaluations, in the base model's spread", gains));
    return lines;
  }

  function plot(title, lines) {
    const width = 380, height = 200, left = 44, right = 12, top = 26, bottom = 24;
    const xs = lines.flatMap((line) => line.x);
    const ys = lines.flatMap((line) => line.y).filter((v) => v !== null);
    const [x0, x1] = [Math.min(...xs), Math.max(...xs)];
    let [y0, y1] = [Math.min(...ys), Math.max(...ys)];
    if (y0 === y1) [y0, y1] = [y0 - 1, y1 + 1];
    const atX = (v) => left + (v - x0) / (x1 - x0 || 1) * (width - left - right);
    const atY = (v) => height - bottom - (v - y0) / (y1 - y0) * (height - top - bottom);
    const svg = draw("svg", { viewBox: `0 0 ${width} ${height}`, class: "drawing", role: "img" });
    svg.append(draw("title", {}, title), draw("text", { x: left, y: 14, class: "f-ink", "font-size": 12 }, title));
    for (const v of [y0, (y0 + y1) / 2, y1]) {
      svg.append(draw("polyline", { points: `${left},${atY(v)} ${width - right},${atY(v)}`, class: "s-grid" }));
      svg.append(draw("text", { x: left - 5, y: atY(v) + 4, class: "f-dim", "font-size": 11, "text-anchor": "end" },
        String(Number(v.toPrecision(3)))));
    }
    for (const [v, anchor] of [[x0, "start"], [x1, "end"]])
      svg.append(draw("text", { x: atX(v), y: height - 8, class: "f-dim", "font-size": 11, "text-anchor": anchor },
        anchor === "end" ? "step " + v : v));
    lines.forEach((line, i) => {
      const hue = (i * 137 + 215) % 360;
      const points = line.x.map((x, k) => [x, line.y[k]]).filter((p) => p[1] !== null);
      const path = draw("polyline", {
        points: points.map(([x, y]) => `${atX(x).toFixed(1)},${atY(y).toFixed(1)}`).join(" "),
        fill: "none", "stroke-width": 1.8,
      });
      path.style.stroke = `hsl(${hue} 65% 55%)`;
      svg.append(path);
    });
    const figure = make("figure", { style: "margin:0" });
    figure.append(svg);
    if (lines.length > 1) {
      const legend = make("div", { class: "legend" });
      lines.forEach((line, i) => {
        const mark = make("b", {}, "\u2014 ");
        mark.style.color = `hsl(${(i * 137 + 215) % 360} 65% 55%)`;
        legend.append(make("span", {}, mark, line.name));
      });
      figure.append(legend);
    }
    return figure;
  }

  // ---- clicks

  const NEAR_PX = 22;
  function nearest(svg, event) {
    const hit = event.target.closest("[data-t]");
    if (hit && svg.contains(hit)) return hit.dataset.t;
    let best = null, least = NEAR_PX ** 2;
    for (const node of svg.querySelectorAll("circle[data-t], polygon[data-t]")) {
      const box = node.getBoundingClientRect();
      const d = (box.x + box.width / 2 - event.clientX) ** 2 + (box.y + box.height / 2 - event.clientY) ** 2;
      if (d < least) [best, least] = [node.dataset.t, d];
    }
    return best;
  }

  const tip = byId("tip");
  for (const place of document.querySelectorAll(".pick")) {
    place.addEventListener("click", (event) => {
      const svg = event.target.closest("svg");
      const id = svg && nearest(svg, event);
      if (id) show(id, true);
    });
    place.addEventListener("pointermove", (event) => {
      const hit = event.target.closest("[data-t]");
      tip.style.display = hit && event.pointerType === "mouse" ? "block" : "none";
      if (!hit || !data.trials[hit.dataset.t]) return;
      const trial = data.trials[hit.dataset.t];
      const gains = data.objectives.map((name) => name + " " + gainOf(trial, data.names.indexOf(name)));
      tip.textContent = [titleOf(hit.dataset.t), ...(hit.dataset.t === "000" ? [] : gains)].join("\n");
      tip.style.left = Math.min(event.clientX + 14, innerWidth - 290) + "px";
      tip.style.top = Math.min(event.clientY + 14, innerHeight - 90) + "px";
    });
    place.addEventListener("pointerleave", () => { tip.style.display = "none"; });
  }

  const which = byId("which");
  for (const id of ids) which.append(make("option", { value: id }, titleOf(id)));
  which.addEventListener("change", () => show(which.value, true));

  for (const row of document.querySelectorAll("tr[data-t]")) {
    row.addEventListener("click", () => show(row.dataset.t, true));
    row.addEventListener("keydown", (event) => { if (event.key === "Enter") show(row.dataset.t, true); });
  }

  for (const choice of document.querySelectorAll("select[data-colors]"))
    choice.addEventListener("change", () => {
      for (const line of document.querySelectorAll("polyline[data-bins]")) {
        const isOn = line.classList.contains("on");
        line.setAttribute("class", "s-ramp" + line.dataset.bins.split(" ")[choice.selectedIndex] + (isOn ? " on" : ""));
      }
    });

  // ---- all trials

  const all = byId("all");
  all?.addEventListener("toggle", () => { if (all.open && !all.dataset.made) list(null, 1); });

  function list(column, sign) {
    all.dataset.made = "yes";
    const keys = [...ids];
    const titles = ["trial", ...data.names, ...data.settings];
    const cell = (id, c) => {
      const trial = data.trials[id];
      if (c === 0) return id;
      return c <= data.names.length ? trial.gains[c - 1] : trial.values[c - 1 - data.names.length];
    };
    const rank = (v) => (v === null || v === "" ? -Infinity : isNaN(v) ? v : Number(v));
    if (column !== null)
      keys.sort((a, b) => {
        const [x, y] = [rank(cell(a, column)), rank(cell(b, column))];
        return sign * (x < y ? -1 : x > y ? 1 : 0);
      });
    const head = make("tr", {}, ...titles.map((title, c) => {
      const button = make("button", { type: "button", title: "Sort" }, title);
      button.addEventListener("click", () => list(c, c === column ? -sign : -1));
      return make("th", {}, button);
    }));
    const body = make("tbody", {}, ...keys.map((id) => {
      const cells = titles.map((_, c) => make("td", {},
        c > 0 && c <= data.names.length ? signed(cell(id, c)) : String(cell(id, c))));
      const row = make("tr", { "data-t": id, class: byId("trial").dataset.shown === id ? "on" : "" }, ...cells);
      row.addEventListener("click", () => show(id, true));
      return row;
    }));
    byId("rows").replaceChildren(make("table", {}, make("thead", {}, head), body));
  }

  const asked = decodeURIComponent(location.hash.replace("#trial-", ""));
  show(data.trials[asked] ? asked : data.first, false);
})();
