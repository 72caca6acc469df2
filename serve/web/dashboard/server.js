// Requests to the server that the page came from. The key is kept in this module's memory only.

const TIMEOUT_MS = 5000;
const RETRY_MS = 30_000;
let key = "";

export class KeyNeeded extends Error {}

export function setKey(value) {
  key = value;
}

export const hasKey = () => key !== "";

async function get(path) {
  const headers = key ? { "x-api-key": key } : {};
  const response = await fetch(path, { headers, cache: "no-store", signal: AbortSignal.timeout(TIMEOUT_MS) });
  if (response.status === 401) throw new KeyNeeded();
  if (!response.ok) throw new Error(`${path} answered ${response.status}`);
  return response;
}

// The latest answer of /v1/sessions, for which nothing waits: an engine gives it between two steps. Null where nobody
// tells, as a proxy before another engine does not; it is asked again after a while.
let [listed, listing, askAt] = [null, null, 0];

function sessions() {
  if (!listing && Date.now() >= askAt) listing = list().finally(() => (listing = null));
  return listed;
}

async function list() {
  try {
    listed = await (await get("/v1/sessions")).json();
  } catch {
    [listed, askAt] = [null, Date.now() + RETRY_MS];
  }
}

// {data, volatile, causes, metrics, sessions}
export async function poll() {
  // With a proxy, the metrics are those of another engine, if it has any.
  const metrics = get("/metrics").then((response) => response.text()).catch(() => "");
  const requests = await get("/v1/requests");
  const answer = await requests.json();
  return { ...answer, metrics: ownMetrics(parseMetrics(await metrics)), sessions: sessions() };
}

// A key that is no admin's gets its own figures only: they take the place of the server's.
function ownMetrics(metrics) {
  if (metrics.has("tokenzero_requests_total")) return metrics;
  const general = (name) =>
    name.replace("key_requests_in_flight", "num_requests_running").replace("tokenzero_key_", "tokenzero_");
  return new Map([...metrics].map(([name, values]) => [general(name), values]));
}

// Prometheus text -> name -> [{labels, value}]
function parseMetrics(text) {
  const metrics = new Map();
  for (const line of text.split("\n")) {
    const [, name, labels, value] = line.match(/^([a-z_]\w*)(?:\{(.*)\})? (\S+)$/i) ?? [];
    if (!name) continue;
    const pairs = [...(labels ?? "").matchAll(/(\w+)="((?:[^"\\]|\\.)*)"/g)].map(([, k, v]) => [k, v]);
    if (!metrics.has(name)) metrics.set(name, []);
    metrics.get(name).push({ labels: Object.fromEntries(pairs), value: Number(value) });
  }
  return metrics;
}
