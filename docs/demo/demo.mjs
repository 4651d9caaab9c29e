// A digit, turned as the training data were; two networks say what it is, in onnxruntime-web, on this machine alone.
import * as ort from "./vendor/ort.wasm.min.mjs";

ort.env.wasm.numThreads = 1;
const SIZE = 28, CLASSES = 10, STEP = 5, ORDER = 12, CHANNELS = 6, SIDE = 26;
const NAMES = ["pdo_econv", "cnn", "fields"];
const COLOURS = [...Array(CLASSES).keys()].map((k) => `hsl(${36 * k} 70% 50%)`);
const $ = (id) => document.getElementById(id);
const still = Array.from({ length: SIZE * SIZE }, () => 0);
let digit = Float32Array.from(still), sessions = [], asked = 0;

/** The image turned counter-clockwise about its centre, bilinearly, zero outside: datasets/rotation.py in JavaScript. */
export function rotate(image, degrees) {
  const angle = (degrees * Math.PI) / 180, cos = Math.cos(angle), sin = Math.sin(angle), middle = (SIZE - 1) / 2;
  const at = (i, j) => (i >= 0 && j >= 0 && i < SIZE && j < SIZE ? image[i * SIZE + j] : 0);
  return Float32Array.from(still, (_, k) => {
    const row = Math.floor(k / SIZE) - middle, column = (k % SIZE) - middle;
    const y = cos * row + sin * column + middle, x = cos * column - sin * row + middle;
    const i = Math.floor(y), j = Math.floor(x), down = y - i, right = x - j;
    return (1 - down) * ((1 - right) * at(i, j) + right * at(i, j + 1)) + down * ((1 - right) * at(i + 1, j) + right * at(i + 1, j + 1));
  });
}

/** What network k says of an image: logits, or the fields of its first layer. */
async function run(k, image) {
  const outputs = await sessions[k].run({ x: new ort.Tensor("float32", image, [1, SIZE, SIZE, 1]) });
  return Object.values(outputs)[0].data;
}

function softmax(logits) {
  const largest = Math.max(...logits), e = Array.from(logits, (v) => Math.exp(v - largest)), sum = e.reduce((a, b) => a + b);
  return e.map((v) => v / sum);
}

function paint(canvas, values, side, colour) {
  const context = canvas.getContext("2d"), small = new OffscreenCanvas(side, side), pixels = new ImageData(side, side);
  values.forEach((v, k) => pixels.data.set(colour(v), 4 * k));
  small.getContext("2d").putImageData(pixels, 0, 0);
  context.imageSmoothingEnabled = false;
  context.drawImage(small, 0, 0, canvas.width, canvas.height);
}

const grey = (v) => [255 * v, 255 * v, 255 * v, 255];

async function show() {
  const mine = ++asked, began = performance.now(), turned = rotate(digit, Number($("dial").value));
  $("angle").textContent = `${$("dial").value}°`;
  paint($("pad"), digit, SIZE, grey);
  paint($("turned"), turned, SIZE, grey);
  const logits = [await run(0, turned), await run(1, turned)], said = logits.map(softmax);
  if (mine !== asked) return;
  [...$("bars").tBodies[0].rows].forEach((row, k) => said.forEach((p, which) => {
    row.cells[1 + which].style.setProperty("--p", p[k]);
    row.cells[1 + which].textContent = p[k] >= 0.005 ? `${Math.round(100 * p[k])} %` : "";
  }));
  document.body.dataset.logits = JSON.stringify(logits.map((l) => Array.from(l)));
  document.body.dataset.milliseconds = (performance.now() - began).toFixed(1);
  document.body.dataset.first ??= performance.now().toFixed(0);
  const most = said.map((p) => p.indexOf(Math.max(...p)));
  $("status").textContent = `${most[0]}, says the PDO-eConv; the plain CNN: ${most[1]}`;
  const fields = await run(2, turned);
  if (mine !== asked) return;
  const largest = fields.reduce((a, v) => Math.max(a, Math.abs(v)), 1e-6);
  [...$("fields").children].forEach((canvas, g) => paint(canvas, Array.from({ length: SIDE * SIDE }, (_, k) =>
    fields[k * CHANNELS * ORDER + g]), SIDE, (v) => (v > 0 ? [255, 255 * (1 - v / largest), 255 * (1 - v / largest), 255]
    : [255 * (1 + v / largest), 255 * (1 + v / largest), 255, 255])));
}

/** Both networks around the circle, drawn as it comes; given up when another digit is taken. */
async function around() {
  const image = digit, points = [[], []];
  for (let degrees = 0; degrees <= 360; degrees += STEP) {
    const turned = rotate(image, degrees);
    for (const k of [0, 1]) points[k].push(Array.from(await run(k, turned)));
    if (image !== digit) return;
    if (degrees % 45 === 0) points.forEach((lines, k) => draw($(`curve${k}`), lines));
    await new Promise((resolve) => setTimeout(resolve));
  }
  document.body.dataset.around = JSON.stringify(points.map((lines) => [0, 1, 2, 3, 4, 5, 6, 7, 8, 9].map((c) => {
    const values = lines.map((l) => l[c]);
    return Math.max(...values) - Math.min(...values);
  })));
}

function draw(canvas, lines) {
  const context = canvas.getContext("2d"), { width, height } = canvas, low = -4, high = 8;
  const y = (v) => height - ((v - low) / (high - low)) * height;
  context.clearRect(0, 0, width, height);
  context.fillStyle = context.strokeStyle = getComputedStyle(document.body).color;
  context.font = "15px system-ui, sans-serif";
  context.globalAlpha = 0.3;
  for (let degrees = 0; degrees <= 360; degrees += 90) context.fillRect((degrees / 360) * (width - 1), 0, 1, height);
  context.fillRect(0, y(0), width, 1);
  context.globalAlpha = 0.7;
  for (let degrees = 0; degrees < 360; degrees += 90) context.fillText(`${degrees}°`, (degrees / 360) * width + 4, height - 5);
  context.globalAlpha = 1;
  for (let c = 0; c < CLASSES; c++) {
    context.strokeStyle = COLOURS[c];
    context.lineWidth = 2;
    context.beginPath();
    lines.forEach((logits, k) => context.lineTo(((STEP * k) / 360) * width, y(logits[c])));
    context.stroke();
    context.fillStyle = COLOURS[c];
    context.fillText(String(c), 5 + 17 * c, 16);
  }
}

function take(image, button) {
  digit = Float32Array.from(image);
  document.querySelectorAll("#digits button").forEach((b) => b.setAttribute("aria-pressed", b === button));
  show();
  around();
}

function drawing() {
  let last = null;
  const place = (event) => {
    const box = $("pad").getBoundingClientRect();
    return [((event.clientY - box.top) / box.height) * SIZE - 0.5, ((event.clientX - box.left) / box.width) * SIZE - 0.5];
  };
  const stroke = (from, to) => {
    const next = Float32Array.from(digit), [dy, dx] = [to[0] - from[0], to[1] - from[1]], length = dy * dy + dx * dx || 1;
    for (let k = 0; k < next.length; k++) {
      const p = [Math.floor(k / SIZE), k % SIZE];
      const t = Math.min(1, Math.max(0, ((p[0] - from[0]) * dy + (p[1] - from[1]) * dx) / length));
      const away = Math.hypot(p[0] - from[0] - t * dy, p[1] - from[1] - t * dx);
      next[k] = Math.max(next[k], Math.min(1, Math.max(0, 1.9 - away)));
    }
    digit = next;
  };
  $("pad").addEventListener("pointerdown", (event) => {
    $("pad").setPointerCapture(event.pointerId);
    last = place(event);
    stroke(last, last);
    show();
  });
  $("pad").addEventListener("pointermove", (event) => {
    if (!last) return;
    const now = place(event);
    stroke(last, now);
    last = now;
    show();
  });
  $("pad").addEventListener("pointerup", () => { last = null; take(digit, null); });
  $("clear").addEventListener("click", () => take(still, null));
}

for (let k = 0; k < CLASSES; k++) {
  const row = $("bars").tBodies[0].insertRow();
  row.insertCell().textContent = k;
  for (const kind of ["ours", "other"]) row.insertCell().className = kind;
}
for (let g = 0; g < ORDER; g++) {
  const canvas = Object.assign(document.createElement("canvas"), { width: 70, height: 70, title: `${30 * g}°` });
  $("fields").append(canvas);
}
drawing();
$("dial").addEventListener("input", show);
const asksFor = new URLSearchParams(location.search);
const [digits] = await Promise.all([fetch("digits.json").then((r) => r.json()),
  Promise.all(NAMES.map((name) => ort.InferenceSession.create(`${name}.onnx`))).then((all) => { sessions = all; })]);
const buttons = digits.map(({ label, image }) => {
  const button = document.createElement("button"), canvas = Object.assign(document.createElement("canvas"), { width: 56, height: 56 });
  button.type = "button";
  button.setAttribute("aria-label", `a ${label}`);
  paint(canvas, image, SIZE, (v) => grey(v / 255));
  button.append(canvas);
  button.addEventListener("click", () => take(Float32Array.from(image, (v) => v / 255), button));
  $("digits").append(button);
  return button;
});
$("dial").value = asksFor.get("angle") ?? 0;
buttons[Number(asksFor.get("digit") ?? 0)].click();
