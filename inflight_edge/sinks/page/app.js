// The live page: one stream of server-sent events in, the document out. No library, no build step.
"use strict";

const POINTS = 600;
const byId = (id) => document.getElementById(id);
const state = { points: [], message: null, camera: "", paused: false, picture: "", flagged: "" };

function element(name, text, attributes = {}) {
  const node = document.createElement(name);
  if (text !== null) node.textContent = text;
  for (const [key, value] of Object.entries(attributes)) node.setAttribute(key, value);
  return node;
}

function shape(name, attributes, text) {
  const node = document.createElementNS("http://www.w3.org/2000/svg", name);
  for (const [key, value] of Object.entries(attributes)) node.setAttribute(key, value);
  if (text !== undefined) node.textContent = text;
  return node;
}

const count = (n) => n.toLocaleString("en");
const micro = (us) => (us < 1000 ? `${us < 10 ? us.toFixed(1) : Math.round(us)} µs` : us < 1e6 ? `${(us / 1000).toPrecision(3)} ms` : `${(us / 1e6).toPrecision(3)} s`);
const nats = (v) => (v === null ? "-" : Math.abs(v) >= 1000 ? v.toExponential(2) : v.toFixed(2));

function sentence(point) {
  switch (point.decision) {
    case "accept": return `Accepted: ${point.predicted}`;
    case "unguarded": return `Unguarded: ${point.predicted}`;
    case "trigger": return `Trigger: looks like ${point.source}, classifier says ${point.predicted}`;
    default: return `Invalid: not judged`;
  }
}

function detail(point) {
  const label = point.label === null ? "refused" : `label ${point.label}`;
  const margin = point.margin === null ? "" : `, margin ${nats(point.margin)} nats`;
  const file = point.file ? `, ${point.file}` : "";
  return `frame ${count(point.index)}${file}, ${label}${margin}${point.reason ? `. ${point.reason}` : ""}`;
}

function showFrame(message) {
  const point = message.newest[state.camera];
  const picture = byId("picture");
  if (!point) {
    byId("frame").className = "";
    byId("verdict").textContent = "-";
    byId("detail").textContent = "";
    picture.hidden = true;
    byId("no-picture").hidden = false;
    return;
  }
  byId("frame").className = point.decision;
  byId("verdict").textContent = sentence(point);
  byId("detail").textContent = detail(point);
  picture.hidden = !point.picture;
  byId("no-picture").hidden = point.picture;
  if (!point.picture) byId("no-picture").textContent = "This frame has no picture.";
  const key = `${state.camera} ${point.number}`;
  if (point.picture && key !== state.picture && (picture.complete || !picture.src)) {
    state.picture = key;
    picture.src = `frame/${encodeURIComponent(state.camera)}?n=${point.number}`;
    picture.alt = `${sentence(point)}, frame ${point.index}`;
  }
}

function showCounts(status) {
  const rows = [
    ["frames captured", count(status.captured)], ["judged", count(status.judged)],
    ["accepted", count(status.decisions.accept)], ["unguarded", count(status.decisions.unguarded)],
    ["triggers", count(status.decisions.trigger)], ["invalid", count(status.decisions.invalid)],
    ["dropped", count(status.dropped)], ["lost by sinks", count(status.lost)],
    ["reconnections", count(status.reconnects)], ["frames a second", status.uptime_s > 0 ? (status.judged / status.uptime_s).toFixed(1) : "-"],
    ["running for", `${count(Math.round(status.uptime_s))} s`],
  ];
  for (const [name, waiting] of Object.entries(status.queues)) rows.push([`waiting: ${name}`, count(waiting)]);
  byId("counts").replaceChildren(...rows.flatMap(([name, value]) => [element("dt", name), element("dd", value)]));
  const alarm = byId("alarm");
  const text = status.alarms.length ? `Alarm: ${status.alarms.join(", ")}` : "";
  if (alarm.textContent !== text) alarm.textContent = text;
  alarm.hidden = !text;
}

// Drawn in the pixels it has, so that text stays readable on a narrow screen.
function fit(svg) {
  const width = Math.max(200, svg.clientWidth);
  svg.setAttribute("viewBox", `0 0 ${width} 180`);
  return width;
}

function showMargins() {
  const width = fit(byId("margins"));
  const points = state.points.filter((p) => p.camera === state.camera && p.margin !== null);
  const nodes = [shape("line", { x1: 0, x2: width, y1: 90, y2: 90, class: "axis" })];
  nodes.push(shape("text", { x: 4, y: 84 }, "0, triggers above"));
  const largest = Math.max(1, ...points.map((p) => Math.abs(p.margin)));
  const scale = 80 / Math.asinh(largest);
  points.forEach((p, i) => {
    const x = width - 4 - (points.length - 1 - i) * ((width - 8) / POINTS);
    nodes.push(shape("circle", { cx: x.toFixed(1), cy: (90 - scale * Math.asinh(p.margin)).toFixed(1), r: 2.5, class: `dot-${p.decision}` }));
  });
  if (points.length) {
    nodes.push(shape("text", { x: 4, y: 14 }, nats(largest)), shape("text", { x: 4, y: 176 }, nats(-largest)));
  }
  byId("margins").replaceChildren(...nodes);
  const flagged = points.filter((p) => p.decision === "trigger").length;
  byId("margins-text").textContent = points.length
    ? `The last ${count(points.length)} guarded frames, ${count(flagged)} of them triggers; newest at the right; scale asinh.`
    : "No frame was predicted as a guarded class yet.";
}

function showLatency(message) {
  const bars = message.latency;
  const highest = Math.max(1, ...bars.map((bar) => bar[1]));
  const full = fit(byId("latency"));
  const width = full / Math.max(1, bars.length);
  const nodes = bars.map(([, n], i) => shape("rect", {
    x: (i * width).toFixed(2), width: Math.max(1, width - 1).toFixed(2),
    y: (150 - (140 * n) / highest).toFixed(2), height: ((140 * n) / highest).toFixed(2), class: "bar",
  }));
  nodes.push(shape("line", { x1: 0, x2: full, y1: 150, y2: 150, class: "axis" }));
  if (bars.length) {
    const labels = [...new Set([0, Math.floor((bars.length - 1) / 2), bars.length - 1])];
    labels.forEach((i) => nodes.push(shape("text", {
      x: Math.min(full - 4, Math.max(4, (i + 0.5) * width)), y: 168, "text-anchor": i === 0 ? "start" : i === bars.length - 1 ? "end" : "middle",
    }, micro(bars[i][0]))));
  }
  byId("latency").replaceChildren(...nodes);
  const whole = message.status.stages.whole;
  byId("latency-text").textContent = whole
    ? `${count(whole.count)} frames: median ${micro(whole.p50_ns / 1000)}, 99 % below ${micro(whole.p99_ns / 1000)}.` : "Nothing measured yet.";
  byId("stages").replaceChildren(...Object.entries(message.status.stages).map(([name, s]) => {
    const row = element("tr", null);
    row.append(element("td", name), ...[s.p50_ns, s.p99_ns, s.max_ns].map((ns) => element("td", micro(ns / 1000))));
    return row;
  }));
}

function showFlagged(message) {
  const key = message.flagged.map((f) => f.number).join();
  if (key === state.flagged) return;
  state.flagged = key;
  byId("no-flagged").hidden = message.flagged.length > 0;
  const list = byId("flagged");
  const known = new Map([...list.children].map((item) => [item.dataset.number, item]));
  list.replaceChildren(...message.flagged.map((f) => known.get(String(f.number)) || flaggedItem(f)));
}

function flaggedItem(f) {
  const item = element("li", null, { "data-number": f.number });
  const button = element("button", null, { type: "button", class: f.decision });
  if (f.picture) button.append(element("img", null, { src: `flagged/${f.number}`, alt: "", loading: "lazy" }));
  button.append(element("span", `${f.camera} ${count(f.index)}: ${sentence(f)}`));
  button.addEventListener("click", () => openDialog(f));
  item.append(button);
  return item;
}

function openDialog(f) {
  byId("dialog-title").textContent = sentence(f);
  const picture = byId("dialog-picture");
  picture.hidden = !f.picture;
  if (f.picture) { picture.src = `flagged/${f.number}`; picture.alt = `Frame ${f.index} of ${f.camera}`; }
  const facts = [["camera", f.camera], ["frame", count(f.index)], ["time", new Date(f.time_ms).toISOString()], ["predicted", f.predicted ?? "-"],
    ["source", f.source ?? "-"], ["margin", `${nats(f.margin)} nats`], ["label", f.label ?? "refused"]];
  if (f.file) facts.push(["file", f.file]);
  if (f.reason) facts.push(["reason", f.reason]);
  byId("dialog-facts").replaceChildren(...facts.flatMap(([name, value]) => [element("dt", name), element("dd", String(value))]));
  const rows = Object.entries(f.log_likelihoods).sort((a, b) => (b[1] ?? -Infinity) - (a[1] ?? -Infinity));
  byId("dialog-likelihoods-title").hidden = rows.length === 0;
  byId("dialog-likelihoods").replaceChildren(...rows.map(([name, value], i) => {
    const row = element("tr", null, i === 0 ? { class: "best" } : {});
    row.append(element("td", name), element("td", nats(value)));
    return row;
  }));
  byId("dialog").showModal();
}

function showCameras(cameras) {
  const select = byId("camera");
  if ([...select.options].map((o) => o.value).join("\n") !== cameras.join("\n")) {
    select.replaceChildren(...cameras.map((name) => element("option", name, { value: name })));
    if (!cameras.includes(state.camera)) state.camera = cameras[0] ?? "";
    select.value = state.camera;
  }
  byId("camera-label").hidden = cameras.length < 2;
}

function show() {
  const message = state.message;
  if (!message) return;
  showCameras(message.cameras);
  showFrame(message);
  showCounts(message.status);
  showMargins();
  showLatency(message);
  showFlagged(message);
  byId("footer").textContent = message.bundle ? `bundle ${message.bundle}` : "";
}

function connection(text, good) {
  const badge = byId("connection");
  if (badge.textContent !== text) badge.textContent = text;
  badge.className = `badge ${good ? "good" : "bad"}`;
}

const events = new EventSource("events");
events.addEventListener("open", () => {
  state.points = []; // the server sends what it keeps to every new connection
  connection("live", true);
});
events.addEventListener("error", () => connection("no connection, trying again", false));
events.addEventListener("message", (event) => {
  const message = JSON.parse(event.data);
  state.points = state.points.concat(message.points).slice(-POINTS);
  state.message = message;
  if (!state.paused) show();
});
byId("pause").addEventListener("click", () => {
  state.paused = !state.paused;
  byId("pause").setAttribute("aria-pressed", String(state.paused));
  byId("pause").textContent = state.paused ? "Go on" : "Pause";
  if (!state.paused) show();
});
byId("camera").addEventListener("change", (event) => {
  state.camera = event.target.value;
  state.picture = "";
  show();
});
