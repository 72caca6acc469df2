// Sessions as lanes: what each agent does, what it holds, and on which tier.

import { clock, count, make, short } from "./format.js";

const card = document.getElementById("sessions-card");
const lanes = document.getElementById("sessions");
const DOES = { running: "runs", tool: "waits for a tool", person: "waits for a person", ended: "has ended", unknown: "answered" };
const TIERS = ["device", "host", "disk"];
let drawn = "";

// `listed`: the answer of /v1/sessions; null where there is none, as from a proxy before another engine.
export function drawSessions(listed) {
  card.hidden = !listed;
  if (!listed) return;
  const { data, left_out: more, reason } = listed;
  const whole = (name, value) => (name === "last_read" ? undefined : name === "since" ? Math.round(value) : value);
  const content = JSON.stringify(listed, whole);
  if (content === drawn) return tick();
  drawn = content;
  const agents = data.flatMap((session) => session.agents);
  const longest = Math.max(1, ...agents.map((agent) => agent.prompt_tokens));
  document.getElementById("sessions-count").textContent = data.length
    ? `${count(data.length)}, ${count(agents.length)} agents${more ? `, and ${count(more)} more` : ""}`
    : "";
  lanes.replaceChildren(...data.map((session) => lane(session, longest)));
  const text = document.getElementById("sessions-reason");
  text.hidden = !reason;
  text.textContent = reason ? `${reason[0].toUpperCase()}${reason.slice(1)}.` : "";
}

// Only the time passes: what is pointed at stays.
function tick() {
  for (const text of lanes.querySelectorAll("[data-since]")) {
    const passed = age(Date.now() / 1000 - Number(text.dataset.since));
    if (text.textContent !== passed) text.textContent = passed;
  }
}

function lane({ session, key, agents }, longest) {
  const name = make("div", { class: "session", title: session }, make("code", {}, brief(session)), key ? make("small", {}, key) : null);
  const rows = inOrder(session, agents).map((agent) => row(session, agent, longest));
  return make("li", { class: "lane" }, name, make("ul", {}, ...rows));
}

// The main agent first, then the others, the latest first.
const inOrder = (session, agents) => [...agents].sort((a, b) => (b.agent === session) - (a.agent === session));

function row(session, agent, longest) {
  const main = agent.agent === session;
  const holds = `holds ${count(agent.device_tokens)} tokens on the device, ${count(agent.own_tokens)} of them its own`;
  const latest = Object.entries(agent.tiers).map(([tier, tokens]) => `${count(tokens)} ${tier}`);
  const about = [
    `${agent.agent}${agent.parent ? ` of ${agent.parent}` : ""}: ${DOES[agent.state]} since ${clock(agent.since)}`,
    holds,
    `of its latest prompt of ${count(agent.prompt_tokens)} tokens: ${latest.join(", ")}`,
    `last read ${agent.state === "running" ? "now" : clock(agent.last_read)}`,
  ].join("; ");
  const passed = make("small", { "data-since": agent.since }, age(Date.now() / 1000 - agent.since));
  return make(
    "li",
    { class: `agent ${agent.state}`, title: about, "data-agent": agent.agent },
    make("span", { class: main ? "name" : "name child" }, main ? "main" : brief(agent.agent)),
    make("span", { class: `does ${agent.state}` }, make("i", {}), DOES[agent.state], passed),
    make("span", { class: "strip", "aria-hidden": "true" }, ...runs(agent, longest)),
    make("span", { class: "number" }, short(agent.device_tokens)),
    make("span", { class: "number time" }, agent.state === "running" ? "now" : clock(agent.last_read)),
    make("span", { class: "unseen" }, about),
  );
}

// Its latest prompt: what the device has, what each tier has beyond that, and the rest, which would be computed.
function runs(agent, longest) {
  const parts = [];
  let at = 0;
  const add = (kind, to) => {
    if (to <= at) return;
    const part = make("i", { class: `run ${kind}` });
    part.style.left = `${(100 * at) / longest}%`;
    part.style.width = `${(100 * (to - at)) / longest}%`;
    parts.push(part);
    at = to;
  };
  for (const tier of TIERS) add(tier, agent.tiers[tier] ?? 0);
  add("fresh", agent.prompt_tokens);
  return parts;
}

const brief = (id) => (id.length > 13 ? `${id.slice(0, 12)}…` : id);

function age(seconds) {
  if (seconds < 60) return `${Math.max(0, Math.floor(seconds))} s`;
  if (seconds < 3600) return `${Math.floor(seconds / 60)} min`;
  return `${Math.floor(seconds / 3600)} h`;
}
