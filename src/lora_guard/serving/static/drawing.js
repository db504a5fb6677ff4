// Draws an answer's checks: the score over its tokens, and the categories of one check.

import { el, make, readable } from "./common.js";

function svg(tag, attributes, text) {
  const node = document.createElementNS("http://www.w3.org/2000/svg", tag);
  for (const [name, value] of Object.entries(attributes)) node.setAttribute(name, value);
  if (text !== undefined) node.textContent = text;
  return node;
}

export function drawLine(checks, cut, limit) {
  const [left, right, top, bottom] = [26, 312, 8, 110];
  const most = Math.max(1, ...checks.map((check) => check.tokens));
  const x = (tokens) => left + ((right - left) * tokens) / most;
  const y = (score) => bottom - (bottom - top) * score;
  const nodes = [
    svg("path", { class: "axis", d: `M${left} ${top}V${bottom}H${right}`, fill: "none" }),
    svg("text", { x: 4, y: y(0) + 3 }, "0"),
    svg("text", { x: 4, y: y(1) + 6 }, "1"),
    svg("text", { x: right, y: 124, "text-anchor": "end" }, `${most} tokens`),
    svg("line", { class: "threshold", x1: left, x2: right, y1: y(limit), y2: y(limit) }),
    svg("path", { class: "curve", d: checks.map((c, i) => `${i ? "L" : "M"}${x(c.tokens)} ${y(c.score)}`).join("") }),
  ];
  for (const check of checks) {
    const over = check.score >= limit;
    const point = svg("circle", { class: over ? "over" : "", cx: x(check.tokens), cy: y(check.score), r: over ? 4 : 2.5 });
    point.append(svg("title", {}, `${check.score.toFixed(3)} at ${check.tokens} tokens`));
    nodes.push(point);
  }
  if (cut) nodes.push(svg("line", { class: "cut", x1: x(cut.tokens), x2: x(cut.tokens), y1: top, y2: bottom }));
  el("line").replaceChildren(...nodes);
  const highest = Math.max(0, ...checks.map((check) => check.score));
  el("line").setAttribute("aria-label", `${checks.length} checks, highest score ${highest.toFixed(2)}`);
}

export function drawBars(check) {
  const rows = Object.entries(check.categories).sort((a, b) => b[1].score - a[1].score);
  el("no-bars").hidden = rows.length > 0;
  el("of").textContent = `of the ${check.target === "prompt" ? "prompt" : `answer at ${check.tokens} tokens`}`;
  el("bars").replaceChildren(
    ...rows.map(([name, decision]) => {
      const row = make("li", decision.flagged ? "flagged" : "");
      const bar = make("div", "bar");
      bar.append(make("div", "fill"));
      bar.style.setProperty("--score", decision.score);
      row.title = `${name}: ${decision.score.toFixed(3)}`;
      if (decision.threshold !== undefined) {
        bar.append(make("div", "limit"));
        bar.style.setProperty("--limit", decision.threshold);
        row.title += `, flagged from ${decision.threshold.toFixed(2)} on`;
      }
      row.append(make("span", "name", readable(name)), bar, make("span", "value", decision.score.toFixed(2)));
      return row;
    }),
  );
}
