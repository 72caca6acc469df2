// Polls the server once a second and draws its records.

import { drawHits, drawTtft } from "./charts.js";
import { TIERS, clock, count, duration, make, percent, short } from "./format.js";
import { KeyNeeded, hasKey, poll, setKey } from "./server.js";
import { drawSessions } from "./sessions.js";
import { drawLegend, drawStrips } from "./strips.js";

const EVERY_MS = 1000;
const KEPT = 1000; // requests; the server lists only its latest
const $ = (id) => document.getElementById(id);

const requests = new Map(); // by id
let answer = null; // the server's latest
let answered = null; // when, in seconds since 1970
let drawn = ""; // what the charts and strips show

function listed() {
  return [...requests.values()].sort((a, b) => b.time - a.time);
}

function take(latest) {
  answer = latest;
  answered = Date.now() / 1000;
  for (const request of latest.data) requests.set(request.id, request);
  for (const { id } of listed().slice(KEPT)) requests.delete(id);
}

const total = (name, filter = () => true) =>
  (answer.metrics.get(name) ?? []).filter(({ labels }) => filter(labels)).reduce((sum, { value }) => sum + value, 0);

function draw() {
  if (!answer) return;
  const all = listed();
  drawTiles(all);
  drawRules();
  drawVolatile();
  drawSessions(answer.sessions);
  const content = JSON.stringify([answer.data, $("only-lost").checked, $("stretch").checked, $("ttft").clientWidth]);
  if (content === drawn) return;
  drawn = content;
  const rows = $("only-lost").checked ? all.filter(({ lost_tokens }) => lost_tokens) : all;
  drawTtft($("ttft"), all);
  drawHits($("hits"), all);
  drawLegend(new Set(all.flatMap((r) => TIERS.filter((tier) => r.reused_by_tier[tier]))));
  drawStrips(rows, answer.causes, $("stretch").checked);
  $("count").textContent = all.length ? `the latest ${count(all.length)}` : "";
  $("empty").hidden = rows.length > 0;
  $("empty").textContent = all.length
    ? "None of these lost tokens that were cached."
    : "Waiting for the first request. Point an agent at this address, or POST to /v1/messages.";
}

function drawTiles(all) {
  const [prompt, reused] = [total("tokenzero_prompt_tokens_total"), total("tokenzero_reused_tokens_total")];
  const causes = (answer.metrics.get("tokenzero_cache_miss_tokens_total") ?? []).filter(({ value }) => value);
  const lost = causes.reduce((sum, { value }) => sum + value, 0);
  const worst = causes.sort((a, b) => b.value - a.value)[0];
  const times = all.flatMap(({ ttft_ms }) => ttft_ms ?? []).sort((a, b) => a - b);
  const tiles = [
    ["hit rate", prompt ? percent(reused / prompt) : "–", `${short(reused)} of ${short(prompt)} prompt tokens`],
    ["median first token", times.length ? duration(times[Math.floor(times.length / 2)]) : "–", `of ${count(times.length)} requests here`],
    ["lost to mismatches", short(lost), worst ? `tokens, most to: ${worst.labels.cause}` : "tokens"],
    ["generated", short(total("tokenzero_generated_tokens_total")), `tokens, for ${count(total("tokenzero_requests_total"))} requests`],
    ["running", count(total("tokenzero_num_requests_running")), `${count(total("tokenzero_num_requests_waiting"))} waiting`],
  ];
  if (answer.metrics.has("tokenzero_audited_requests_total")) {
    const wrong = total("tokenzero_audit_mismatches_total");
    const mismatched = wrong ? `${count(wrong)} mismatched: see the log` : "none mismatched";
    tiles.push(["audited", count(total("tokenzero_audited_requests_total")), mismatched, wrong && "wrong"]);
  }
  $("tiles").replaceChildren(
    ...tiles.map(([name, value, more, kind]) => make("div", { class: kind ? `tile ${kind}` : "tile" }, make("span", {}, name), make("b", {}, value), make("small", {}, more))),
  );
}

function drawRules() {
  const applied = answer.metrics.get("tokenzero_rule_applications_total") ?? [];
  const saved = (rule) => total("tokenzero_rule_saved_tokens_total", (labels) => labels.rule === rule);
  const rules = applied.map(({ labels, value }) => ({ rule: labels.rule, texts: value, tokens: saved(labels.rule) }));
  if (!rules.length) return $("rules").replaceChildren(make("p", { class: "nothing" }, "No rule has changed a request yet."));
  const most = Math.max(...rules.map(({ tokens }) => tokens), 1);
  const rows = rules.sort((a, b) => b.tokens - a.tokens).map(({ rule, texts, tokens }) => {
    const seconds = total("tokenzero_rule_saved_seconds_total", (labels) => labels.rule === rule);
    const bar = make("i", { class: "run device" });
    bar.style.width = `${(100 * tokens) / most}%`;
    return make(
      "tr",
      {},
      make("th", { scope: "row" }, make("code", {}, rule)),
      make("td", { class: "meter", "aria-hidden": "true" }, bar),
      make("td", {}, `${short(tokens)} tokens`),
      make("td", {}, seconds ? duration(1000 * seconds) : ""),
      make("td", { class: "quiet" }, `${count(texts)} texts changed`),
    );
  });
  $("rules").replaceChildren(make("table", {}, make("tbody", {}, ...rows)));
}

function drawVolatile() {
  const found = answer.volatile.map(({ client, section, line, before, after }) =>
    make(
      "li",
      {},
      make("p", {}, make("code", {}, section), ` line ${line} of `, make("b", {}, client || "a client without a name")),
      before === undefined ? null : make("div", { class: "text" }, make("q", {}, before), " → ", make("q", {}, after)),
    ),
  );
  const none = make("p", { class: "nothing" }, "No part of a client's prompts changes in every request.");
  $("volatile").replaceChildren(found.length ? make("ul", {}, ...found) : none);
}

function say(state, text) {
  document.body.dataset.state = state;
  $("status").dataset.state = state;
  if ($("status").textContent !== text) $("status").textContent = text;
}

function askForKey() {
  $("ask-text").textContent = hasKey()
    ? "The server did not take that key."
    : "It stays in this page's memory and is gone when the page is.";
  say("waiting", "the server needs its key");
  return new Promise((resolve) => {
    $("ask").querySelector("form").onsubmit = (event) => {
      event.preventDefault();
      setKey($("key").value);
      $("key").value = "";
      $("ask").close();
      resolve();
    };
    $("ask").oncancel = (event) => event.preventDefault();
    $("ask").showModal();
  });
}

const pause = (ms) => new Promise((resolve) => setTimeout(resolve, ms));

async function live() {
  for (;;) {
    try {
      take(await poll());
      say("live", "live");
      draw();
    } catch (problem) {
      if (problem instanceof KeyNeeded) {
        await askForKey();
        continue;
      }
      const since = answered ? `since ${clock(answered)}` : "so far";
      say("gone", `no answer from the server ${since}; trying again`);
      console.warn(problem);
    }
    await pause(EVERY_MS);
    // While the page is hidden, nothing is polled.
    while (document.hidden) await new Promise((resolve) => addEventListener("visibilitychange", resolve, { once: true }));
  }
}

$("only-lost").addEventListener("change", draw);
$("stretch").addEventListener("change", draw);
new ResizeObserver(draw).observe($("ttft"));
live();
