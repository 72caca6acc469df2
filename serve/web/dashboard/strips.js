// Requests as strips of tokens, and the tooltip that shows what broke a prefix.

import { KINDS, clock, count, duration, make, percent, reuse, segments, sentence, span, verdict } from "./format.js";

// What an agent does after its answer.
const AFTER = { tool: "its agent waits for a tool", person: "its agent waits for a person", ended: "its agent has ended" };

const list = document.getElementById("requests");
const tip = document.getElementById("tip");
const rows = new Map(); // id -> {row, drawn}
let shown = null; // id of the request that the tooltip shows
let pointed = null; // the point of a chart that it belongs to; null for the request's row
let known = { requests: [], causes: {} };

export function drawLegend(tiers) {
  const kinds = Object.entries(KINDS).filter(([kind]) => !["host", "disk", "remote", "expected"].includes(kind) || tiers.has(kind));
  const items = kinds.map(([kind, text]) => make("li", {}, make("i", { class: `run ${kind}` }), text));
  document.getElementById("legend").replaceChildren(
    ...items,
    make("li", {}, make("i", { class: "key-mark" }), "mismatch"),
  );
}

// `requests`: the latest first. `stretch`: every strip as long as the page allows.
export function drawStrips(requests, causes, stretch) {
  known = { requests, causes };
  const longest = requests.reduce((most, request) => Math.max(most, span(request)), 1);
  const focused = document.activeElement?.dataset.id;
  const kept = new Set(requests.map(({ id }) => id));
  for (const [id, { row }] of rows) {
    if (!kept.has(id)) {
      row.parentElement.remove();
      rows.delete(id);
    }
  }
  requests.forEach((request, index) => {
    const scale = stretch ? span(request) : longest;
    const content = JSON.stringify([request, scale]);
    const { row, drawn } = rows.get(request.id) ?? newRow(request.id);
    if (drawn !== content) fill(row, request, scale);
    rows.set(request.id, { row, drawn: content });
    if (list.children[index] !== row.parentElement) list.insertBefore(row.parentElement, list.children[index] ?? null);
  });
  if (focused && rows.has(focused)) rows.get(focused).row.focus({ preventScroll: true });
  tabTo(rows.get(focused)?.row ?? list.querySelector(".row[tabindex='0']") ?? list.querySelector(".row"));
  if (pointed && !pointed.isConnected) hideTip();
  else if (shown) showTip(shown, pointed);
}

function newRow(id) {
  const row = make("button", { class: "row", type: "button", "data-id": id, tabindex: -1, "aria-describedby": "tip" });
  make("li", {}, row);
  return { row, drawn: "" };
}

function fill(row, request, scale) {
  const at = (tokens) => `${(100 * tokens) / scale}%`;
  const strip = make("span", { class: "strip", "aria-hidden": "true" });
  for (const { kind, start, tokens } of segments(request)) {
    const run = make("i", { class: `run ${kind}` });
    run.style.left = at(start);
    run.style.width = at(tokens);
    strip.append(run);
  }
  if (request.state === "running") {
    const tail = make("i", { class: "tail" });
    tail.style.left = at(request.prompt_tokens);
    strip.append(tail);
  }
  if (request.cause) {
    const mark = make("i", { class: `mark ${verdict(request)}`, "data-position": request.position });
    mark.style.left = at(request.position);
    strip.append(mark);
  }
  const ttft = request.ttft_ms === undefined ? "–" : duration(request.ttft_ms);
  row.replaceChildren(
    make("span", { class: "time" }, clock(request.time)),
    strip,
    make("span", { class: "number" }, percent(reuse(request))),
    make("span", { class: "number" }, ttft),
    make("span", { class: `cause ${verdict(request)}` }, request.cause ?? "no mismatch"),
  );
  row.setAttribute("aria-label", sentence(request));
  row.dataset.verdict = verdict(request);
}

// One row at a time can be reached with Tab; arrow keys choose which.
function tabTo(row) {
  for (const other of list.querySelectorAll(".row[tabindex='0']")) if (other !== row) other.tabIndex = -1;
  if (row) row.tabIndex = 0;
}

list.addEventListener("keydown", (event) => {
  const item = event.target.closest("li");
  const target = {
    ArrowDown: item?.nextElementSibling,
    ArrowUp: item?.previousElementSibling,
    Home: list.firstElementChild,
    End: list.lastElementChild,
  }[event.key];
  if (target) {
    event.preventDefault();
    target.firstElementChild.focus();
  }
});
list.addEventListener("focusin", (event) => {
  tabTo(event.target);
  showTip(event.target.dataset.id);
});
list.addEventListener("focusout", hideTip);
list.addEventListener("pointerover", (event) => showTip(event.target.closest(".row")?.dataset.id));
list.addEventListener("pointerleave", hideTip);
list.addEventListener("click", (event) => event.target.closest(".row")?.focus());
addEventListener("keydown", (event) => event.key === "Escape" && hideTip());
addEventListener("scroll", () => shown && place(pointed ?? rows.get(shown)?.row), { passive: true, capture: true });

export function hideTip() {
  if (shown) rows.get(shown)?.row.classList.remove("shown");
  shown = pointed = null;
  tip.hidden = true;
}

// Next to `point`, or to the request's row.
export function showTip(id, point = null) {
  const request = known.requests.find((request) => request.id === id);
  if (!request) return hideTip();
  if (shown !== id) hideTip();
  shown = id;
  pointed = point;
  const row = rows.get(id)?.row;
  row?.classList.add("shown");
  tip.replaceChildren(...about(request, known.causes));
  tip.hidden = false;
  place(point ?? row);
}

function place(anchor) {
  if (!anchor) return;
  const target = anchor.querySelector?.(".mark") ?? anchor.querySelector?.(".strip") ?? anchor;
  const box = target.getBoundingClientRect();
  const room = anchor.getBoundingClientRect();
  const left = Math.min(Math.max(8, box.left - 24), innerWidth - tip.offsetWidth - 8);
  const below = room.bottom + 6;
  const above = room.top - tip.offsetHeight - 6;
  tip.style.left = `${left}px`;
  tip.style.top = `${below + tip.offsetHeight < innerHeight || above < 0 ? below : above}px`;
}

function about(request, causes) {
  const parts = [
    make(
      "p",
      { class: `verdict ${verdict(request)}` },
      make("b", {}, request.cause ?? "no mismatch"),
      ` ${request.cause ? (causes[request.cause] ?? "") : "it goes on where a cached sequence ends"}`,
    ),
  ];
  if (request.cause) {
    const where = make("p", {}, "token ", make("b", {}, count(request.position)), ` of ${count(request.prompt_tokens)}`);
    if (request.section) where.append(" in ", make("code", {}, request.section));
    parts.push(where);
    parts.push(...texts(request));
  }
  const facts = [
    ["reused", Object.entries(request.reused_by_tier).filter(([, n]) => n).map(([t, n]) => `${count(n)} ${t}`).join(", ") || "0"],
    ["computed", count(request.recomputed_tokens)],
    ["lost", request.lost_tokens ? `up to ${count(request.lost_tokens)} tokens${request.lost_ms === undefined ? "" : `, ${duration(request.lost_ms)}`}` : ""],
    ["first token", request.ttft_ms === undefined ? "" : duration(request.ttft_ms)],
    ["phases", Object.entries(request.phases_ms ?? {}).filter(([, ms]) => ms >= 0.05).map(([phase, ms]) => `${duration(ms)} ${phase}`).join(", ")],
    ["generated", request.state === "done" ? count(request.generated_tokens ?? 0) : (request.state ?? "running")],
    ["agent", [request.agent, request.session !== request.agent && request.session && `of session ${request.session}`].filter(Boolean).join(" ")],
    ["then", request.agent && request.agent_state ? AFTER[request.agent_state] : ""],
    ["rules", (request.rules ?? []).join(", ")],
    ["saved", Object.entries(request.saved_tokens ?? {}).map(([rule, n]) => `${count(n)} by ${rule}`).join(", ")],
  ];
  const list = make("dl", {});
  for (const [name, value] of facts) if (value) list.append(make("dt", {}, name), make("dd", {}, value));
  return [...parts, list, make("p", { class: "id" }, request.id)];
}

// Both texts from the mismatch on, with the characters that they still share in grey.
function texts({ prompt_text: prompt, nearest_text: nearest }) {
  if (prompt === undefined || prompt === null) {
    return [make("p", { class: "id" }, "texts are hidden: --no-prompt-text-in-reports")];
  }
  const [a, b] = [[...(nearest ?? "")], [...prompt]];
  let same = 0;
  while (same < Math.min(a.length, b.length) && a[same] === b[same]) same += 1;
  const line = (name, characters) =>
    make(
      "div",
      { class: "text" },
      make("span", { class: "label" }, name),
      make("q", {}, make("s", {}, visible(characters.slice(0, same))), visible(characters.slice(same))),
    );
  return [...(nearest ? [line("there was", a)] : []), line("and now", b)];
}

const visible = (characters) => characters.join("").replaceAll("\n", "⏎").replaceAll("\t", "→");
