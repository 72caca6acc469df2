// Two charts in SVG: TTFT against mismatch position, and the hit rate over time.

import { clock, count, duration, make, percent, reuse, short, verdict } from "./format.js";
import { hideTip, showTip } from "./strips.js";

const HEIGHT = 220;
const MARGIN = { left: 50, right: 14, top: 12, bottom: 36 };
const INSET = 10; // of the first and last point from the ends of the grid
const WINDOW = 20; // requests that the hit rate is taken over
const REACH = 24; // pixels within which a point is pointed at

// Round steps that cover [0, most], `about` of them.
function ticks(most, about) {
  const rough = most / about;
  const power = 10 ** Math.floor(Math.log10(rough));
  const step = [1, 2, 5, 10].map((n) => n * power).find((n) => n >= rough);
  return Array.from({ length: Math.ceil(most / step) + 1 }, (_, i) => i * step);
}

function frame(host, { x, y, xTicks, yTicks, xText, yText, xTitle, label }) {
  const svg = make("svg:svg", { viewBox: `0 0 ${host.clientWidth} ${HEIGHT}`, role: "img", "aria-label": label });
  const [left, right, bottom] = [MARGIN.left, host.clientWidth - MARGIN.right, HEIGHT - MARGIN.bottom];
  for (const value of yTicks) {
    svg.append(
      make("svg:line", { class: "grid", x1: left, x2: right, y1: y(value), y2: y(value) }),
      make("svg:text", { class: "tick", x: left - 8, y: y(value) + 4, "text-anchor": "end" }, yText(value)),
    );
  }
  for (const [i, value] of xTicks.entries()) {
    const anchor = i === 0 ? "start" : i === xTicks.length - 1 ? "end" : "middle";
    svg.append(make("svg:text", { class: "tick", x: x(value), y: bottom + 16, "text-anchor": anchor }, xText(value)));
  }
  svg.append(make("svg:text", { class: "title", x: (left + right) / 2, y: HEIGHT - 3, "text-anchor": "middle" }, xTitle));
  return svg;
}

const scale = (from, to, low, high) => (value) => low + ((high - low) * (value - from)) / (to - from || 1);

const ends = (host) => [MARGIN.left + INSET, host.clientWidth - MARGIN.right - INSET];

// Shapes differ as colours do.
function point(request, cx, cy) {
  const kind = verdict(request);
  const common = { class: `point ${kind}`, "data-id": request.id };
  if (kind === "lost") {
    return make("svg:path", { ...common, d: `M${cx} ${cy - 5.5}l5.5 5.5l-5.5 5.5l-5.5 -5.5z` });
  }
  return make("svg:circle", { ...common, cx, cy, r: kind === "good" ? 3.5 : 4 });
}

// The nearest point under the pointer shows its request.
function follow(svg, placed) {
  svg.addEventListener("pointermove", (event) => {
    const box = svg.getBoundingClientRect();
    const away = ({ cx, cy }) => Math.hypot(cx - (event.clientX - box.left), cy - (event.clientY - box.top));
    const best = placed.reduce((a, b) => (away(b) < away(a) ? b : a), placed[0]);
    for (const { element } of placed) element.classList.toggle("near", element === best?.element && away(best) < REACH);
    if (best && away(best) < REACH) showTip(best.request.id, best.element);
    else hideTip();
  });
  svg.addEventListener("pointerleave", () => {
    for (const { element } of placed) element.classList.remove("near");
    hideTip();
  });
}

function draw(host, svg, requests, x, y) {
  const placed = requests.map((request) => {
    const [cx, cy] = [x(request), y(request)];
    return { request, cx, cy, element: point(request, cx, cy) };
  });
  svg.append(...placed.map(({ element }) => element));
  follow(svg, placed);
  host.replaceChildren(svg);
}

const nothing = (host, text) => host.replaceChildren(make("p", { class: "nothing" }, text));

export function drawTtft(host, requests) {
  const measured = requests.filter(({ ttft_ms }) => ttft_ms !== undefined);
  if (!measured.length) return nothing(host, "No first token has been timed yet.");
  const xTicks = ticks(Math.max(...measured.map(({ position }) => position), 1), 5);
  const times = measured.map(({ ttft_ms }) => ttft_ms);
  const [least, most] = [Math.min(...times), Math.max(...times)];
  const log = most > 20 * least;
  const [low, high] = log ? [10 ** Math.floor(Math.log10(least)), 10 ** Math.ceil(Math.log10(most))] : [0, 0];
  const decades = log ? Array.from({ length: Math.round(Math.log10(high / low)) + 1 }, (_, i) => low * 10 ** i) : [];
  const yTicks = log ? decades : ticks(most, 4);
  const x = scale(0, xTicks.at(-1), ...ends(host));
  const bend = log ? Math.log10 : (value) => value;
  const linear = scale(bend(yTicks[0]), bend(yTicks.at(-1)), HEIGHT - MARGIN.bottom, MARGIN.top);
  const y = (ms) => linear(bend(ms));
  const svg = frame(host, {
    x,
    y,
    xTicks,
    yTicks,
    xText: short,
    yText: (ms) => (ms && yTicks.at(-1) < 1000 ? `${ms} ms` : `${ms / 1000} s`),
    xTitle: `mismatch position, tokens${log ? " (time on a logarithmic scale)" : ""}`,
    label: `Time to first token of ${count(measured.length)} requests against their mismatch positions, from ${duration(least)} to ${duration(most)}`,
  });
  // The latest last, on top.
  draw(host, svg, measured.toReversed(), ({ position }) => x(position), ({ ttft_ms }) => y(ttft_ms));
}

export function drawHits(host, requests) {
  if (!requests.length) return nothing(host, "No request has been answered yet.");
  const ordered = requests.toReversed();
  const [first, last] = [ordered[0].time, ordered.at(-1).time];
  const x = scale(first, last === first ? first + 1 : last, ...ends(host));
  const y = scale(0, 1, HEIGHT - MARGIN.bottom, MARGIN.top);
  const rates = ordered.map((request, i) => {
    const latest = ordered.slice(Math.max(0, i + 1 - WINDOW), i + 1);
    const sum = (field) => latest.reduce((total, one) => total + one[field], 0);
    return [x(request.time), y(sum("reused_tokens") / sum("prompt_tokens"))];
  });
  const svg = frame(host, {
    x,
    y,
    xTicks: last > first ? [first, (first + last) / 2, last] : [first],
    yTicks: [0, 0.25, 0.5, 0.75, 1],
    xText: clock,
    yText: (share) => `${100 * share}%`,
    xTitle: "time",
    label: `Share of prompt tokens reused, over the latest ${WINDOW} requests: ${percent(reuseOf(ordered.slice(-WINDOW)))}`,
  });
  const line = rates.map(([px, py]) => `${px.toFixed(1)} ${py.toFixed(1)}`).join("L");
  const floor = HEIGHT - MARGIN.bottom;
  svg.append(
    make("svg:path", { class: "area", d: `M${rates[0][0]} ${floor}L${line}L${rates.at(-1)[0]} ${floor}Z` }),
    make("svg:path", { class: "line", d: `M${line}` }),
  );
  draw(host, svg, ordered, ({ time }) => x(time), (request) => y(reuse(request)));
}

const reuseOf = (requests) =>
  requests.reduce((sum, r) => sum + r.reused_tokens, 0) / requests.reduce((sum, r) => sum + r.prompt_tokens, 0);
