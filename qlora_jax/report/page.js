"use strict";
// The run list: sorting, filters and the open run are in location.hash, so that a reload (of a page that a running sweep
// rewrites) and a copied address show the same. Texts are set as texts, never as HTML.
(() => {
  const ROWS = 100; // a page
  const again = () => {
    const typing = document.activeElement && document.activeElement.matches("input, select");
    typing ? setTimeout(again, 2000) : location.reload();
  };
  const reload = Number(document.documentElement.dataset.reload);
  if (reload > 0) setTimeout(again, 1000 * reload);
  if (document.documentElement.dataset.follow) {
    // served while runs go on: the server knows what it serves now; without it (it ended, or this is a saved page) all stays
    let shown = null;
    const look = async () => {
      try {
        const now = await (await fetch("version", { cache: "no-store" })).text();
        if (shown !== null && now !== shown) return again();
        shown = now;
      } catch {}
      setTimeout(look, 2000);
    };
    look();
  }
  const holder = document.getElementById("data");
  if (!holder) return;
  const data = JSON.parse(holder.textContent);
  const columns = data.columns;
  const place = new Map(columns.map((column, i) => [column.key, i]));
  const byId = (id) => document.getElementById(id);
  const make = (tag, className, text) => {
    const element = document.createElement(tag);
    if (className) element.className = className;
    if (text !== undefined && text !== null) element.textContent = text;
    return element;
  };
  const show = (column, value) => {
    if (value === null || value === undefined) return "";
    if (column.kind === "choice") return column.values[value];
    if (column.kind === "number") return String(Number(value.toPrecision(4)));
    return String(value);
  };

  // what a search finds in a run, made when it is first asked for
  const texts = new Array(data.rows.length);
  const textOf = (i) => {
    if (texts[i] === undefined) {
      const detail = data.details[i];
      const parts = columns.map((column, at) => show(column, data.rows[i][at]));
      for (const [key, value] of Object.entries(detail.config)) parts.push(`${key}=${value}`);
      for (const group of detail.groups) parts.push(data.groups[group]);
      texts[i] = (parts.join(" ") + " " + (detail.error || "")).toLowerCase();
    }
    return texts[i];
  };

  // state: {sort, down, search, group, page, open, filters: {key: text}}
  const empty = () => ({ sort: "", down: false, search: "", group: "", page: 0, open: "", filters: {} });
  let state = empty();
  const readHash = () => {
    const found = empty();
    if (!location.hash.includes("=")) return found;
    for (const [name, value] of new URLSearchParams(location.hash.slice(1))) {
      if (name === "sort") [found.down, found.sort] = [value.startsWith("-"), value.replace(/^-/, "")];
      else if (name === "q") found.search = value;
      else if (name === "group") found.group = value;
      else if (name === "page") found.page = Math.max(0, (parseInt(value, 10) || 1) - 1);
      else if (name === "open") found.open = value;
      else if (name.startsWith("f.") && place.has(name.slice(2))) found.filters[name.slice(2)] = value;
    }
    return found;
  };
  const writeHash = () => {
    const parameters = new URLSearchParams();
    if (state.sort) parameters.set("sort", (state.down ? "-" : "") + state.sort);
    if (state.search) parameters.set("q", state.search);
    if (state.group) parameters.set("group", state.group);
    if (state.page) parameters.set("page", state.page + 1);
    if (state.open) parameters.set("open", state.open);
    for (const [key, value] of Object.entries(state.filters)) if (value) parameters.set(`f.${key}`, value);
    const text = parameters.toString();
    if (text || location.hash.includes("=")) history.replaceState(null, "", text ? "#" + text : "#runs");
  };

  // "<1.5", ">=3", "1..2" and "=2" compare numbers; anything else is part of the text
  const tester = (column, text) => {
    if (column.kind === "choice" && column.values.includes(text)) {
      const at = column.values.indexOf(text);
      return (value) => value === at;
    }
    const number = (value) => (column.kind === "number" ? value : parseFloat(show(column, value)));
    const range = text.match(/^\s*(-?[\d.e+-]+)\s*\.\.\s*(-?[\d.e+-]+)\s*$/);
    if (range) {
      const [low, high] = [Number(range[1]), Number(range[2])];
      return (value) => value !== null && number(value) >= low && number(value) <= high;
    }
    const compare = text.match(/^\s*(<=|>=|<|>|=)\s*(-?[\d.e+-]+)\s*$/);
    if (compare) {
      const limit = Number(compare[2]);
      const tests = { "<": (x) => x < limit, ">": (x) => x > limit, "<=": (x) => x <= limit, ">=": (x) => x >= limit,
        "=": (x) => x === limit };
      return (value) => value !== null && tests[compare[1]](number(value));
    }
    const part = text.toLowerCase();
    return (value) => show(column, value).toLowerCase().includes(part);
  };
  const selected = () => {
    const tests = Object.entries(state.filters).filter(([, text]) => text)
      .map(([key, text]) => [place.get(key), tester(columns[place.get(key)], text)]);
    const words = state.search.toLowerCase().split(/\s+/).filter(Boolean);
    const group = data.groups.indexOf(state.group);
    const found = [];
    for (let i = 0; i < data.rows.length; i++) {
      if (state.group && !data.details[i].groups.includes(group)) continue;
      if (!tests.every(([at, test]) => test(data.rows[i][at]))) continue;
      if (words.length && !words.every((word) => textOf(i).includes(word))) continue;
      found.push(i);
    }
    const at = place.get(state.sort);
    if (at !== undefined) {
      const sign = state.down ? -1 : 1;
      const isText = columns[at].kind === "text";
      found.sort((a, b) => {
        const [x, y] = [data.rows[a][at], data.rows[b][at]];
        if (x === y) return a - b;
        if (x === null) return 1; // runs without a value come last, either way
        if (y === null) return -1;
        return sign * (isText ? (x < y ? -1 : 1) : x - y);
      });
    }
    return found;
  };

  const table = (rows) => {
    const element = make("table");
    for (const cells of rows) {
      const row = element.appendChild(make("tr"));
      cells.forEach((cell, i) => row.appendChild(make("td", i && typeof cell === "number" ? "n" : "", cell)));
    }
    return element;
  };
  const SVG = "http://www.w3.org/2000/svg";
  const draw = (tag, attributes, parent, text) => {
    const element = document.createElementNS(SVG, tag);
    for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
    if (text !== undefined) element.textContent = text;
    return parent.appendChild(element);
  };
  const chart = (curves) => {
    const [width, height, left, bottom, top] = [460, 210, 48, 30, 8];
    const series = Object.entries(curves).map(([name, [at, values]]) => [name, data.steps[at], values]);
    const all = (pick) => series.flatMap(pick);
    const [x1, y0, y1] = [Math.max(1, ...all((s) => s[1])), Math.min(...all((s) => s[2])), Math.max(...all((s) => s[2]))];
    const x = (step) => left + (step / x1) * (width - left - 8);
    const y = (value) => top + (1 - (value - y0) / (y1 - y0 || 1)) * (height - bottom - top);
    const svg = document.createElementNS(SVG, "svg");
    for (const [name, value] of Object.entries({ width, height, viewBox: `0 0 ${width} ${height}`, role: "img" })) {
      svg.setAttribute(name, value);
    }
    const words = { "font-size": 11, fill: "#5c6670" };
    for (const share of [0, 0.5, 1]) {
      const value = y0 + share * (y1 - y0);
      draw("line", { x1: left, x2: width - 8, y1: y(value), y2: y(value), stroke: "#e1e4e8" }, svg);
      draw("text", { x: left - 6, y: y(value) + 4, "text-anchor": "end", ...words }, svg, String(Number(value.toPrecision(3))));
      draw("text", { x: x(share * x1), y: height - bottom + 15, "text-anchor": share === 1 ? "end" : "middle", ...words }, svg,
        String(Math.round(share * x1)));
    }
    draw("text", { x: width - 8, y: height - 2, "text-anchor": "end", ...words }, svg, "optimizer steps");
    series.forEach(([name, steps, values], k) => {
      const color = ["#0072B2", "#D55E00", "#009E73"][k % 3];
      const points = values.map((value, i) => `${x(steps[i]).toFixed(1)},${y(value).toFixed(1)}`);
      if (points.length === 1) {
        const [cx, cy] = points[0].split(",");
        draw("circle", { cx, cy, r: 3, fill: color }, svg);
      } else draw("polyline", { points: points.join(" "), fill: "none", stroke: color, "stroke-width": 1.6 }, svg);
      draw("text", { x: left + 4 + 110 * k, y: height - 2, "font-size": 11, fill: color }, svg, name.replace("_", " "));
    });
    return svg;
  };
  const detailRow = (i) => {
    const detail = data.details[i];
    const row = make("tr", "detail");
    const outer = row.appendChild(make("td"));
    outer.colSpan = columns.length;
    const cell = outer.appendChild(make("div", "box"));
    if (detail.error) {
      cell.appendChild(make("h3", "", "Error"));
      cell.appendChild(make("pre", "error", detail.error));
    }
    const panes = cell.appendChild(make("div", "panes"));
    const pane = (title, content) => {
      const box = panes.appendChild(make("div"));
      box.appendChild(make("h3", "", title));
      box.appendChild(content);
    };
    if (detail.curves) pane("Metrics", chart(detail.curves));
    if (detail.result) pane("Result", table(Object.entries(detail.result).map(([key, value]) =>
      [key, typeof value === "number" || value === null ? value : String(value)])));
    const own = Object.entries(detail.config);
    pane("Config, where it differs from most runs", own.length
      ? table([["key", "this run", "most runs"], ...own.map(([key, value]) => [key, value, data.base[key]])])
      : make("p", "", "as most runs"));
    const facts = [["hash", data.rows[i][place.get("hash")]], ...detail.groups.map((group) => ["group", data.groups[group]])];
    if (detail.attempts) facts.push(["attempts", detail.attempts]);
    pane("Run", table(facts));
    return row;
  };

  const head = byId("list").tHead;
  const body = byId("list").tBodies[0];
  const fields = new Map();
  const build = () => {
    const names = head.appendChild(make("tr"));
    const filters = head.appendChild(make("tr"));
    for (const column of columns) {
      const button = names.appendChild(make("th")).appendChild(make("button", "", column.name));
      button.type = "button";
      button.title = column.key;
      button.dataset.key = column.key;
      button.addEventListener("click", () => {
        const same = state.sort === column.key;
        change({ sort: same && state.down ? "" : column.key, down: same && !state.down });
      });
      const field = filters.appendChild(make("th")).appendChild(make(column.kind === "choice" ? "select" : "input"));
      field.setAttribute("aria-label", `Filter ${column.name}`);
      if (column.kind === "choice") {
        field.appendChild(new Option("all", ""));
        for (const value of column.values) field.appendChild(new Option(value, value));
      } else field.placeholder = column.kind === "number" ? "<1  >2  1..2" : "part of it";
      field.addEventListener("input", () => change({ filters: { ...state.filters, [column.key]: field.value } }));
      fields.set(column.key, field);
    }
    byId("group").appendChild(new Option("all groups", ""));
    for (const group of data.groups) byId("group").appendChild(new Option(group, group));
    byId("group").hidden = !data.groups.length;
    byId("group").addEventListener("input", () => change({ group: byId("group").value }));
    byId("search").addEventListener("input", () => change({ search: byId("search").value }));
    byId("clear").addEventListener("click", () => change(empty()));
    byId("previous").addEventListener("click", () => change({ page: state.page - 1 }));
    byId("next").addEventListener("click", () => change({ page: state.page + 1 }));
    for (const link of document.querySelectorAll("nav a")) {
      link.addEventListener("click", (event) => { // scrolls without losing the list's state
        if (!location.hash.includes("=")) return;
        event.preventDefault();
        byId(link.dataset.section).scrollIntoView();
      });
    }
  };
  const fill = () => {
    for (const [key, field] of fields) if (field.value !== (state.filters[key] || "")) field.value = state.filters[key] || "";
    if (byId("search").value !== state.search) byId("search").value = state.search;
    byId("group").value = state.group;
    for (const button of head.querySelectorAll("button")) {
      const column = columns[place.get(button.dataset.key)];
      const mark = button.dataset.key === state.sort ? (state.down ? " ↓" : " ↑") : "";
      button.textContent = column.name + mark;
    }
    const found = selected();
    const pages = Math.max(1, Math.ceil(found.length / ROWS));
    state.page = Math.min(Math.max(state.page, 0), pages - 1);
    const rows = document.createDocumentFragment();
    for (const i of found.slice(state.page * ROWS, (state.page + 1) * ROWS)) {
      const hash = data.rows[i][place.get("hash")];
      const row = rows.appendChild(make("tr", "run"));
      columns.forEach((column, at) => {
        const text = show(column, data.rows[i][at]);
        const cell = row.appendChild(make("td", column.kind === "number" ? "n" : column.kind === "text" ? "text" : ""));
        if (column.key === "status") cell.appendChild(make("span", `state ${text}`, text));
        else [cell.textContent, cell.title] = [text, text];
      });
      row.addEventListener("click", () => change({ open: state.open === hash ? "" : hash, page: state.page }));
      if (state.open === hash) {
        row.classList.add("open");
        rows.appendChild(detailRow(i));
      }
    }
    body.replaceChildren(rows);
    byId("found").textContent = `${found.length.toLocaleString("en")} of ${data.rows.length.toLocaleString("en")} runs`;
    byId("page").textContent = `page ${state.page + 1} of ${pages}`;
    byId("previous").disabled = state.page === 0;
    byId("next").disabled = state.page === pages - 1;
  };
  const change = (next) => {
    state = { ...state, page: 0, ...next };
    fill();
    writeHash();
  };
  build();
  state = readHash();
  fill();
  if (location.hash.includes("=")) {
    // where the reader was, if the browser does not know it itself (a copied address)
    if (!performance.getEntriesByType("navigation").some((entry) => entry.type === "reload")) byId("runs").scrollIntoView();
  }
  addEventListener("hashchange", () => {
    if (!location.hash.includes("=")) return;
    state = readHash();
    fill();
  });
})();
