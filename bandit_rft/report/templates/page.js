"use strict";
(() => {
  const byId = (id) => document.getElementById(id);
  const data = (id) => JSON.parse(byId(id).textContent);
  const make = (tag, kind, text) => {
    const node = document.createElement(tag);
    if (kind) node.className = kind;
    if (text !== undefined) node.textContent = text;
    return node;
  };

  // Contents: buttons, so that no link is on the page that a model's text could have put there.
  for (const button of document.querySelectorAll("[data-goto]")) {
    button.addEventListener("click", () => {
      const section = byId(button.dataset.goto);
      section.scrollIntoView();
      section.querySelector("h2").tabIndex = -1;
      section.querySelector("h2").focus({ preventScroll: true });
    });
  }
  byId("contents").hidden = false;

  // Charts: the same numbers as a table, made when it is opened.
  const table_of = (chart) => {
    const table = make("table"), head = table.createTHead().insertRow(), body = table.createTBody(), most = 60;
    for (const name of [chart.axis, ...chart.lines.map((line) => line.name)]) head.append(make("th", "", name));
    const count = chart.x.length, shown = Math.min(count, most);
    for (let k = 0; k < shown; k += 1) {
      const i = count <= most ? k : Math.round(k * (count - 1) / (most - 1)), row = body.insertRow();
      row.append(make("th", "", chart.x[i].toLocaleString("en")));
      for (const line of chart.lines) row.append(make("td", "", line.values[i] ?? "–"));
    }
    const box = make("div", "scroll");
    if (shown < count) box.append(make("p", "note", `${shown} of ${count} points`));
    box.append(table);
    return box;
  };

  // Charts: a readout that follows the pointer, a finger or the arrow keys.
  for (const [id, chart] of Object.entries(data("chart-data"))) {
    const numbers = byId(id).querySelector("details.numbers");
    numbers.hidden = !chart.x.length;
    numbers.addEventListener("toggle", () => { if (numbers.children.length < 2) numbers.append(table_of(chart)); });
    const figure = byId(id), svg = figure.querySelector(".chart"), output = figure.querySelector(".readout");
    const cursor = svg.querySelector(".cursor");
    let at = -1;
    const show = (index) => {
      at = index;
      const parts = chart.lines.filter((line) => line.values[index] !== null).map((line) => `${line.name} ${line.values[index]}`);
      output.textContent = `${chart.axis} ${chart.x[index].toLocaleString("en")}: ${parts.join(" · ")}`;
      cursor.setAttribute("x1", chart.px[index]);
      cursor.setAttribute("x2", chart.px[index]);
      cursor.setAttribute("visibility", "visible");
    };
    const hide = () => { at = -1; output.textContent = ""; cursor.setAttribute("visibility", "hidden"); };
    const follow = (event) => {
      const box = svg.getBoundingClientRect();
      const x = (event.clientX - box.left) / box.width * svg.viewBox.baseVal.width;
      let best = 0;
      chart.px.forEach((px, i) => { if (Math.abs(px - x) < Math.abs(chart.px[best] - x)) best = i; });
      show(best);
    };
    svg.addEventListener("pointermove", follow);
    svg.addEventListener("pointerdown", follow);
    svg.addEventListener("pointerleave", hide);
    svg.addEventListener("blur", hide);
    svg.addEventListener("keydown", (event) => {
      const last = chart.px.length - 1;
      const to = { ArrowLeft: at < 0 ? last : at - 1, ArrowRight: at + 1, Home: 0, End: last }[event.key];
      if (to === undefined) return;
      event.preventDefault();
      show(Math.max(0, Math.min(last, to)));
    });
  }

  // Before and after: one pair at a time.
  const pairs = [...document.querySelectorAll(".pair")];
  if (pairs.length) {
    const split = byId("pair-split"), outcome = byId("pair-outcome");
    let index = 0;
    const update = () => {
      const fit = pairs.filter((p) => p.dataset.split === split.value && (!outcome.value || p.dataset.outcome === outcome.value));
      index = Math.max(0, Math.min(index, fit.length - 1));
      for (const pair of pairs) pair.hidden = pair !== fit[index];
      byId("pair-position").textContent = fit.length ? `${index + 1} of ${fit.length}` : "none";
      byId("pair-previous").disabled = index === 0;
      byId("pair-next").disabled = index >= fit.length - 1;
    };
    for (const control of [split, outcome]) control.addEventListener("change", () => { index = 0; update(); });
    byId("pair-previous").addEventListener("click", () => { index -= 1; update(); });
    byId("pair-next").addEventListener("click", () => { index += 1; update(); });
    byId("pair-controls").hidden = false;
    update();
  }

  // Rollouts: all text enters the page as text, never as markup.
  if (!byId("rollouts")) return;
  const rows = data("rollout-data");
  const SIZE = 20;
  const table = document.querySelector("table.rollouts"), body = table.tBodies[0];
  const headings = [...table.tHead.rows[0].cells];
  let page = 0, key = "round", direction = 1;
  const haystacks = rows.map((row) => [row.prompt, row.completion, row.answer].join("\n").toLowerCase());
  const number = (value, digits) => {
    if (value === null || value === undefined) return "–";
    return value.toLocaleString("en", { maximumFractionDigits: digits }).replace("-", "\u2212");
  };

  const controls = ["search", "reward", "least-reward", "most-reward", "query", "from", "to", "least-tokens",
    "most-tokens", "truncated"].filter(byId);
  const bound = (id) => byId(id) ? byId(id).valueAsNumber : NaN;
  const within = (value, least, most) => {
    const low = bound(least), high = bound(most);
    return (Number.isNaN(low) && Number.isNaN(high)) || (value !== null && !(value < low) && !(value > high));
  };
  const matching = () => {
    const needle = byId("search").value.toLowerCase(), reward = byId("reward").value;
    const truncated = byId("truncated").checked, query = bound("query");
    const kind = (row) => row.reward === null ? "none" : row.reward > 0 ? "positive" : "rest";
    return rows.filter((row, i) => (!needle || haystacks[i].includes(needle)) && (!reward || kind(row) === reward)
      && (Number.isNaN(query) || row.query === query) && (!truncated || row.truncated)
      && within(row.round, "from", "to") && within(row.tokens, "least-tokens", "most-tokens")
      && within(row.reward, "least-reward", "most-reward"));
  };
  const compare = (a, b) => {
    const x = a[key], y = b[key];
    if (x === null || y === null) return (x === null) - (y === null);
    return direction * (typeof x === "string" ? x.localeCompare(y) : x - y);
  };
  const detail = (row) => {
    const line = make("tr", "more"), cell = make("td");
    cell.colSpan = headings.filter((h) => getComputedStyle(h).display !== "none").length;
    for (const [title, text] of [["Prompt", row.prompt], ["Completion", row.completion], ["Answer", row.answer]]) {
      if (text === null) continue;
      const block = make("pre", "", text || "\u27e6empty\u27e7");
      block.dir = "auto";
      block.tabIndex = 0;
      cell.append(make("h4", "", title + (title === "Completion" && row.truncated ? " (truncated)" : "")), block);
    }
    const same = rows.filter((other) => other.query === row.query).length;
    if (row.query !== null && same > 1) {
      const button = make("button", "", `All ${same} rollouts of query ${row.query}`);
      button.type = "button";
      button.addEventListener("click", () => { reset(); byId("query").value = row.query; page = 0; update(); });
      cell.append(button);
    }
    line.append(cell);
    return line;
  };
  const line = (row) => {
    const node = make("tr", "row");
    const first = make("td"), opener = make("button", "opener", number(row.round, 0));
    opener.type = "button";
    opener.setAttribute("aria-expanded", "false");
    opener.setAttribute("aria-label", `Round ${row.round}, query ${row.query}: show the whole rollout`);
    first.append(opener);
    const previews = [row.prompt, row.completion].map((text) => {
      const cell = make("td", "left preview", (text || "\u27e6empty\u27e7").slice(0, 160).replace(/\s+/g, " "));
      cell.dir = "auto";
      return cell;
    });
    node.append(first, make("td", "minor", number(row.query, 0)), make("td", row.reward > 0 ? "win" : "", number(row.reward, 3)),
      make("td", "minor", number(row.advantage, 3)), make("td", "", number(row.tokens, 0)), make("td", "minor", number(row.logprobs, 3)),
      make("td", "minor", number(row.entropy, 3)), ...previews);
    node.addEventListener("click", () => {
      const open = opener.getAttribute("aria-expanded") === "true";
      opener.setAttribute("aria-expanded", String(!open));
      if (open) node.nextSibling.remove(); else node.after(detail(row));
    });
    return node;
  };
  const update = () => {
    const found = matching().sort(compare), pages = Math.max(1, Math.ceil(found.length / SIZE));
    page = Math.max(0, Math.min(page, pages - 1));
    const part = found.slice(page * SIZE, (page + 1) * SIZE);
    body.replaceChildren(...part.map(line));
    byId("shown").textContent = found.length
      ? `${page * SIZE + 1}–${page * SIZE + part.length} of ${found.length.toLocaleString("en")}` : "no rollout matches";
    byId("previous").disabled = page === 0;
    byId("next").disabled = page >= pages - 1;
    for (const h of headings) h.setAttribute("aria-sort", h.dataset.key !== key ? "none" : direction > 0 ? "ascending" : "descending");
  };
  const reset = () => {
    for (const id of controls) { byId(id).value = ""; byId(id).checked = false; }
  };
  for (const id of controls) byId(id).addEventListener("input", () => { page = 0; update(); });
  byId("reset").addEventListener("click", () => { reset(); page = 0; update(); });
  byId("previous").addEventListener("click", () => { page -= 1; update(); });
  byId("next").addEventListener("click", () => { page += 1; update(); });
  for (const h of headings) h.firstChild.addEventListener("click", () => {
    direction = key === h.dataset.key ? -direction : 1;
    key = h.dataset.key;
    page = 0;
    update();
  });
  byId("rollouts").hidden = false;
  update();
})();
