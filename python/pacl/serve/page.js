// The page: what is shown, requests to the server, and what mouse and keys do.
const $ = id => document.getElementById(id);
const make = (name, ...parts) => { const it = document.createElement(name); it.append(...parts); return it; };
const token = new URLSearchParams(location.search).get("token") || "";
const LOGIT_SCALE = 100;  // scale of the softmax shown on hover
const MOST_ZOOM = 16, MOST_HOVERED = 6;
let info, file = null, name = "", bitmap = null, image = null;
let answers = {}, patches = {};  // answers to words and to selected patches, by model
let models = [], view = {kind: "best"};  // {kind: "word", word} and {kind: "patch", row, column}
let zoom = 1, pointer = null;  // pointer: {model, u, v}, where the mouse is over a picture
const figures = new Map();  // by model: {box, port, canvas, map}

// Requests. Each change of image, words or view begins a turn; answers to earlier turns are dropped.
let turn = 0, stop = new AbortController();
function begin() {
  stop.abort();
  stop = new AbortController();
  document.body.classList.add("stale");
  describe();
  return ++turn;
}
const current = mine => { if (mine !== turn) throw new DOMException("a later turn began", "AbortError"); };
async function api(path, body, signal = stop.signal) {
  const options = {headers: {"X-Token": token}, signal};
  if (body !== undefined) { options.method = "POST"; options.body = body instanceof Blob ? body : JSON.stringify(body); }
  let response;
  try { response = await fetch(path, options); }
  catch (error) { throw error.name === "AbortError" ? error : new Error("pacl serve does not answer; it may have ended"); }
  if (response.headers.get("Content-Type") !== "application/json") return response.blob();
  const answer = await response.json();
  if (!response.ok) throw Object.assign(new Error(answer.error), {status: response.status});
  return answer;
}
async function ask(path, request, mine) {  // sends the image again if the server no longer keeps it
  try { return await api(path, {image, ...request}); }
  catch (error) {
    current(mine);
    if (error.status !== 404) throw error;
    const found = await api("/api/image", file);
    current(mine);
    image = found.image;
    return api(path, {image, ...request});
  }
}
let attempts = 0, latest = Promise.resolve();
const attempt = (work, doing = "Working ...") => latest = report(work, doing);
async function report(work, doing) {  // says what takes long, and what fails
  const mine = ++attempts, slow = setTimeout(() => mine === attempts && say(doing), 400);
  let problem = "";
  say("");
  try { await work(); } catch (error) { if (error.name !== "AbortError") problem = error.message; }
  clearTimeout(slow);
  if (mine === attempts) say(problem, problem ? "error" : "");
}
function say(text, kind = "") { [$("said").textContent, $("said").className] = [text, kind]; }
const split = () => [...new Set($("words").value.split(/[,;\n\r，；、،؛]/).map(x => x.trim()).filter(x => x))];
const threshold = () => $("hide").checked ? +$("threshold").value : null;

let opening = 0;  // images on their way: words typed meanwhile wait for them
async function load(get, title) {
  const mine = begin();
  opening++;
  let problem = null;
  try {
    const blob = await get();
    if (blob.size > info.most_bytes) throw new Error(`image: got more than ${info.most_bytes / 2 ** 20} MiB, expected less`);
    const decoded = createImageBitmap(blob).catch(() => null), found = await api("/api/image", blob);
    const picture = await decoded || await createImageBitmap(await api("/api/picture", {image: found.image}));  // such as TIFF
    current(mine);
    [file, name, bitmap, image, answers, patches] = [blob, title, picture, found.image, {}, {}];
    if (view.kind === "patch") view = {kind: "best"};
    zoom = 1;
    for (const button of $("strip").children) button.removeAttribute("aria-current");
    draw();
  } catch (error) { problem = error; }
  opening--;
  if (mine === turn) await refresh();  // after a failure, of the image shown before
  if (problem) throw problem;
}
const take = file => file && attempt(() => load(async () => file, file.name), `Opening ${file.name} ...`);
async function refresh() {  // fetches the scores that the view needs, then draws
  if (opening) return;
  const mine = begin(), words = split(), now = {}, near = {};
  try {
    for (const model of image ? models : []) {
      if (words.length) now[model] = await ask("/api/words", {words, model, threshold: threshold()}, mine);
      if (view.kind === "patch") near[model] = await ask("/api/patch", {row: view.row, column: view.column, model}, mine);
      current(mine);
    }
    [answers, patches] = [now, near];
  } catch (error) {
    if (mine === turn) [answers, patches] = [{}, {}];  // those of other words would mislead
    throw error;
  } finally {
    if (mine === turn) {
      document.body.classList.remove("stale");
      if (view.kind === "word" && !words.includes(view.word)) view = {kind: "best"};
      if (bitmap) draw();
    }
  }
}
const look = next => attempt(() => { view = next; return refresh(); });

// Drawing. Elements stay when their content changes, so that they keep the focus.
function draw() {
  if (bitmap.width > 2 * bitmap.height) $("views").className = "stacked"; else $("views").className = "";
  const boxes = models.map(model => figures.get(model) || figure(model)).map(x => x.box);
  if (boxes.length !== $("views").childElementCount || boxes.some((x, i) => x !== $("views").children[i])) $("views").replaceChildren(...boxes);
  for (const model of models) {
    const it = figures.get(model), [width, height] = scaled(bitmap.width, bitmap.height, PIXELS);
    if (it.canvas.width !== width || it.canvas.height !== height) [it.canvas.width, it.canvas.height] = [width, height];
    it.map = mapOf(model);
  }
  layout();
  paint();
  legend();
  describe();
}
function mapOf(model) {
  const answer = answers[model], near = patches[model], size = scaled(bitmap.width, bitmap.height, MAP_PIXELS);
  if (view.kind === "patch" && near) return heatMap(near.similarity, near, [0, 1], info.magma, ...size);
  if (view.kind === "word" && answer) return heatMap(answer.scores[answer.words.indexOf(view.word)], answer, info.scale, info.magma, ...size);
  return view.kind === "best" && answer ? wordMap(answer, threshold(), ...size) : null;
}
function paint() {
  for (const model of bitmap ? models : []) {
    const {canvas, map} = figures.get(model);
    const context = compose(canvas, bitmap, map, view.kind !== "best", +$("opacity").value);
    if (view.kind === "patch" && patches[model]) frames(context, patches[model], view.row, view.column, canvas.width / (canvas.clientWidth || canvas.width));
  }
}
function figure(model) {
  const canvas = make("canvas"), port = make("div", canvas), box = make("figure", make("figcaption", model), port);
  [port.className, canvas.tabIndex, canvas.dataset.model] = ["port", 0, model];
  canvas.setAttribute("role", "img");
  figures.set(model, {box, port, canvas, map: null});
  const at = event => {
    const where = canvas.getBoundingClientRect();
    return [(event.clientX - where.left) / where.width, (event.clientY - where.top) / where.height];
  };
  let start = null, dragged = false;  // where the mouse went down
  canvas.onpointerdown = event => {
    [start, dragged] = [null, false];
    if (event.pointerType !== "mouse" || event.button) return;
    start = [event.clientX, event.clientY, port.scrollLeft, port.scrollTop];
  };
  canvas.onpointermove = event => {
    const [u, v] = at(event);
    pointer = {model, u, v};
    describe();
    if (!start || zoom === 1 || !dragged && Math.hypot(event.clientX - start[0], event.clientY - start[1]) < 5) return;
    if (!dragged) canvas.setPointerCapture(event.pointerId);
    dragged = true;
    port.classList.add("dragged");
    port.scrollTo(start[2] - event.clientX + start[0], start[3] - event.clientY + start[1]);
  };
  canvas.onpointerup = canvas.onpointercancel = () => { start = null; port.classList.remove("dragged"); };
  canvas.onpointerleave = () => { pointer = null; describe(); };
  canvas.onclick = event => { if (!dragged) select(model, ...at(event)); };
  port.onscroll = () => {  // both models' pictures show the same part
    const own = figures.get(model);
    if (String([port.scrollLeft, port.scrollTop]) === own.led) return;  // it follows another
    own.led = null;
    for (const other of figures.values()) if (other.port !== port) {
      other.port.scrollTo(port.scrollLeft, port.scrollTop);
      other.led = String([other.port.scrollLeft, other.port.scrollTop]);
    }
  };
  port.addEventListener("wheel", event => {
    if (!event.ctrlKey && document.documentElement.scrollHeight > innerHeight + 1) return;  // the page itself scrolls
    event.preventDefault();
    zoomTo(zoom * Math.exp(-event.deltaY * (event.ctrlKey ? 0.01 : 0.002)), port, event.clientX, event.clientY);
  }, {passive: false});
  let apart = 0;  // the distance of two fingers
  const fingers = event => {
    if (event.touches.length !== 2) { apart = 0; return; }
    event.preventDefault();
    const [a, b] = event.touches, now = Math.hypot(a.clientX - b.clientX, a.clientY - b.clientY);
    if (apart) zoomTo(zoom * now / apart, port, (a.clientX + b.clientX) / 2, (a.clientY + b.clientY) / 2);
    apart = now;
  };
  for (const kind of ["touchstart", "touchmove", "touchend"]) port.addEventListener(kind, fingers, {passive: false});
  return figures.get(model);
}
function select(model, u, v) {  // the patch at a point of the image
  attempt(async () => {
    const known = answers[model] || patches[model] || await ask("/api/patch", {row: 0, column: 0, model}, turn);
    const [row, column] = cell(known, u, v);
    view = {kind: "patch", row, column};
    await refresh();
  });
}
function layout() {  // at zoom 1 the picture fills its column
  if (!bitmap) return;
  const narrow = !matchMedia("(min-width: 900px)").matches;
  for (const {port, canvas} of figures.values()) {
    if (!port.isConnected) continue;
    const high = Math.min(Math.max(port.offsetWidth * bitmap.height / bitmap.width, 160), 0.6 * innerHeight);
    port.style.height = narrow ? `${Math.round(high)}px` : "";
    const fit = Math.min(port.offsetWidth / bitmap.width, port.offsetHeight / bitmap.height);
    const side = length => `${zoom === 1 ? Math.max(1, Math.floor(length * fit)) : Math.round(length * fit * zoom)}px`;
    [canvas.style.width, canvas.style.height] = [side(bitmap.width), side(bitmap.height)];
    port.classList.toggle("zoomed", zoom > 1);
  }
  $("zoom").textContent = `${Math.round(100 * zoom)} %`;
  if (view.kind === "patch") paint();  // its frames keep their width on the screen
}
function zoomTo(to, port, x, y) {  // keeps the point of the picture that is at (x, y), by default the middle
  const it = [...figures.values()].find(f => f.port === port) || figures.get(models[0]);
  if (!bitmap || !it) return;
  const area = it.port.getBoundingClientRect(), before = it.canvas.getBoundingClientRect();
  [x, y] = [x ?? area.left + area.width / 2, y ?? area.top + area.height / 2];
  const [u, v] = [(x - before.left) / before.width, (y - before.top) / before.height];
  zoom = Math.min(Math.max(to, 1), MOST_ZOOM);
  layout();
  const after = it.canvas.getBoundingClientRect();
  it.port.scrollBy(after.left + u * after.width - x, after.top + v * after.height - y);
}
function reveal() {  // scrolls a zoomed picture to the selected patch
  const near = patches[models[0]];
  for (const model of near ? models : []) {
    const {port, canvas} = figures.get(model), [x, y, w, h] = box(near, view.row, view.column);
    const [left, top, right, bottom] = [x * canvas.clientWidth, y * canvas.clientHeight, (x + w) * canvas.clientWidth, (y + h) * canvas.clientHeight];
    port.scrollTo(Math.min(Math.max(port.scrollLeft, right - port.clientWidth), left), Math.min(Math.max(port.scrollTop, bottom - port.clientHeight), top));
  }
}
function describe() {  // the words that belong to the view: its sentence, the numbers at a patch, the Python lines
  const fresh = !document.body.classList.contains("stale"), answer = answers[models[0]];
  const shown = {
    best: answer ? "each place has the colour of the word that fits it best." : "type words to see where they are.",
    word: `bright places match “${view.word}” best.`,
    patch: "bright places look like the selected patch.",
  }[view.kind];
  $("caption").textContent = bitmap ? `${name}: ${shown}` : "Open an image and type words to see where they are.";
  for (const [model, {canvas}] of figures) canvas.setAttribute("aria-label", `${model}, ${name}: ${shown} Enter selects a patch, arrow keys move it.`);
  const lines = (view.kind === "patch" ? patches : answers)[models[0]];
  $("lines").textContent = fresh && lines ? `path = ${JSON.stringify(name)}\n${lines.python}` : "";
  $("hover").replaceChildren(...(fresh && bitmap ? hovered() : []));
}
function hovered() {
  const chosen = view.kind === "patch", model = pointer ? pointer.model : models[0];
  const grid = answers[model] || patches[model];
  if (!grid || !pointer && !chosen) return grid ? ["Point at the picture to see the numbers of a patch."] : [];
  const [row, column] = pointer ? cell(grid, pointer.u, pointer.v) : [view.row, view.column];
  const all = answers[model] ? numbers(answers[model], row, column, LOGIT_SCALE) : [];
  const parts = all.slice(0, MOST_HOVERED).map(([word, x, share]) => `${word}: cosine ${x.toFixed(3)}, softmax ${share.toFixed(2)}`);
  if (all.length > MOST_HOVERED) parts.push(`${all.length - MOST_HOVERED} more words`);
  if (chosen && patches[model]) parts.push(`similarity to the selected patch: ${patches[model].similarity[row * patches[model].w + column].toFixed(3)}`);
  const note = make("small", `Softmax: the word's share at this patch if all words compete with ${LOGIT_SCALE} times their cosines. It says which word fits best, not how well.`);
  return [make("b", `${model}, row ${row}, column ${column}`), `  ${parts.join("; ")}`, ...(all.length ? [note] : [])];
}
const rows = new Map();  // of the legend, by word
function entry(word) {
  const [swatch, text, number] = ["i", "span", "output"].map(x => make(x)), button = make("button", swatch, text, number);
  text.textContent = word;
  text.dir = "auto";
  button.onclick = () => look(view.kind === "word" && view.word === word ? {kind: "best"} : {kind: "word", word});
  return {item: make("li", button), button, swatch, number};
}
function legend() {
  const answer = answers[models[0]], chosen = view.kind === "patch";
  let found = answer ? answer.words.map((word, k) => [word, Math.max(...answer.scores[k])]) : [];
  if (answer && chosen) found = numbers(answer, view.row, view.column, LOGIT_SCALE);
  const items = found.map(([word, value]) => {
    if (!rows.has(word)) rows.set(word, entry(word));
    const it = rows.get(word);
    it.swatch.style.background = `rgb(${answer.colours[answer.words.indexOf(word)]})`;
    it.number.textContent = value.toFixed(3);
    it.button.setAttribute("aria-pressed", view.kind === "word" && view.word === word);
    return it.item;
  });
  for (const word of rows.keys()) if (!answer || !answer.words.includes(word)) rows.delete(word);
  $("head").textContent = !answer ? "" : `${models[0]}: ${chosen ? "cosine at the selected patch" : "highest cosine in the image"}`;
  const list = $("legend"), focused = document.activeElement, top = list.scrollTop;
  if (items.length !== list.childElementCount || items.some((x, i) => x !== list.children[i])) {
    list.replaceChildren(...items);
    list.scrollTop = top;
    if (list.contains(focused)) focused.focus({preventScroll: true});
  }
  $("best").setAttribute("aria-pressed", view.kind === "best");
  $("scale").replaceChildren();
  if (view.kind === "best") return;
  const [low, high] = chosen ? [0, 1] : info.scale, bar = make("canvas");
  [bar.id, bar.width, bar.height] = ["bar", 100, 12];
  const context = bar.getContext("2d");
  for (let x = 0; x < 100; x++) {
    context.fillStyle = `rgb(${heat(x / 99, [0, 1], info.magma).map(Math.round)})`;
    context.fillRect(x, 0, 1, 12);
  }
  $("scale").append(`${low.toFixed(2)} `, bar, ` ${high.toFixed(2)} cosine`);
}
