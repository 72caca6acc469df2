// Numbers as text, elements from names, and what a request means.

const COUNT = new Intl.NumberFormat("en");
const SHORT = new Intl.NumberFormat("en", { notation: "compact", maximumFractionDigits: 1 });

export const count = (n) => COUNT.format(Math.round(n));
export const short = (n) => SHORT.format(n);
export const percent = (share) => (share >= 0.9995 ? "100%" : `${(100 * share).toFixed(1)}%`);
export const clock = (seconds) => new Date(1000 * seconds).toLocaleTimeString("en-GB");

export function duration(ms) {
  if (ms >= 10_000) return `${(ms / 1000).toFixed(1)} s`;
  return ms >= 10 ? `${count(ms)} ms` : `${ms.toFixed(1)} ms`;
}

// An element, or an SVG element if its name starts with `svg:`; children are added as text, never as markup.
export function make(name, attributes = {}, ...children) {
  const [, svg, tag] = name.match(/^(svg:)?(.+)$/);
  const element = svg ? document.createElementNS("http://www.w3.org/2000/svg", tag) : document.createElement(tag);
  for (const [key, value] of Object.entries(attributes)) {
    if (value !== undefined && value !== null && value !== false) element.setAttribute(key, value);
  }
  element.append(...children.filter((child) => child !== undefined && child !== null));
  return element;
}

// `expected`: of a proxy, which does not see what the engine has cached.
export const TIERS = ["device", "host", "disk", "remote", "expected"];
export const KINDS = {
  device: "reused: device",
  host: "host",
  disk: "disk",
  remote: "remote",
  expected: "expected in the cache",
  lost: "recomputed",
  fresh: "new",
  generated: "generated",
};

export const reuse = (request) => (request.prompt_tokens ? request.reused_tokens / request.prompt_tokens : 0);

// good: no mismatch; lost: the nearest sequence held more; new: the content is new.
export function verdict(request) {
  if (!request.cause) return "good";
  return request.lost_tokens ? "lost" : "new";
}

// The runs of tokens that a request's strip shows: [{kind, start, tokens}]
export function segments(request) {
  const lost = request.lost_tokens ?? 0;
  const runs = [
    ...TIERS.map((tier) => [tier, request.reused_by_tier[tier] ?? 0]),
    ["lost", lost],
    ["fresh", request.recomputed_tokens - lost],
    ["generated", request.generated_tokens ?? 0],
  ];
  let start = 0;
  const placed = runs.map(([kind, tokens]) => ({ kind, tokens, start: (start += tokens) - tokens }));
  return placed.filter(({ tokens }) => tokens > 0);
}

export const span = (request) => request.prompt_tokens + (request.generated_tokens ?? 0);

// A request in a sentence, for screen readers.
export function sentence(request) {
  const found = `${clock(request.time)}: ${count(request.reused_tokens)} of ${count(request.prompt_tokens)} tokens reused`;
  const why = request.cause
    ? `; mismatch at token ${count(request.position)} in ${request.section}: ${request.cause}`
    : "; no mismatch";
  const ttft = request.ttft_ms === undefined ? "" : `; first token after ${duration(request.ttft_ms)}`;
  return found + why + ttft;
}
