// Downloads: those of the words in the box, even if they were typed a moment ago.
let wait = 0;
function words() {  // fetches what was typed
  clearTimeout(wait);
  wait = 0;
  attempt(refresh);
}
async function settled() {
  if (wait) words();
  await latest;
}
function save(blob, as) {
  const link = make("a");
  [link.href, link.download] = [URL.createObjectURL(blob), as];
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 1000);
}
function sheet() {  // the views, whole, over their legend
  const answer = answers[models[0]];
  const entries = !answer || view.kind === "patch" ? [] : view.kind === "word" ? [[null, view.word]] : answer.words.map((word, k) => [answer.colours[k], word]);
  return sheetOf(models.map(x => [x, figures.get(x).canvas]), entries, bitmap.width > 2 * bitmap.height);
}
$("png").onclick = async () => { await settled(); if (bitmap) sheet().toBlob(blob => save(blob, "pacl.png")); };
$("json").onclick = async () => {
  await settled();
  if (image) save(new Blob([JSON.stringify({image: name, view, threshold: threshold(), words: answers, patches}, null, 1)], {type: "application/json"}), "pacl.json");
};
$("python").onclick = async () => {
  await settled();
  if ($("lines").textContent) save(new Blob([$("lines").textContent], {type: "text/x-python"}), "pacl_view.py");
  $("code").open = true;
};

// Controls.
$("best").onclick = () => look({kind: "best"});
$("opacity").oninput = paint;
$("threshold").oninput = $("hide").onchange = event => {
  if (event.target === $("threshold")) $("hide").checked = true;
  $("least").textContent = (+$("threshold").value).toFixed(2);
  if (bitmap) draw();
  if (event.target === $("hide")) attempt(refresh);
};
$("threshold").onchange = () => attempt(refresh);  // updates the Python lines, which contain the threshold
$("words").oninput = () => {
  history.replaceState(null, "", "#" + new URLSearchParams({words: $("words").value}));
  if (!opening) begin();  // the numbers shown are those of other words
  clearTimeout(wait);
  wait = setTimeout(words, 400);
};
$("in").onclick = () => zoomTo(zoom * 1.5);
$("out").onclick = () => zoomTo(zoom / 1.5);
$("fit").onclick = () => zoomTo(1);
$("file").onchange = () => { take($("file").files[0]); $("file").value = ""; };
const blocked = event => event.preventDefault();
document.ondragover = event => { blocked(event); $("drop").className = "over"; };
document.ondragleave = () => { $("drop").className = ""; };
document.ondrop = event => {
  blocked(event);
  $("drop").className = "";
  take(event.dataTransfer.files[0]);
};
document.onpaste = event => take(event.clipboardData.files[0]);
const STEPS = {ArrowUp: [-1, 0], ArrowDown: [1, 0], ArrowLeft: [0, -1], ArrowRight: [0, 1]};
document.onkeydown = event => {
  const on = event.target, model = on.dataset?.model, step = STEPS[event.key];
  if (event.ctrlKey || event.metaKey || event.altKey || on.closest?.("textarea, input, #strip")) return;
  if (["+", "="].includes(event.key)) zoomTo(zoom * 1.5);
  if (event.key === "-") zoomTo(zoom / 1.5);
  if (event.key === "0") zoomTo(1);
  if (event.key === "Escape" && $("help").open) $("help").open = false;
  else if (event.key === "Escape" && view.kind !== "best") look({kind: "best"});
  if (model && (event.key === "Enter" || event.key === " " || step && !event.shiftKey) && view.kind !== "patch") {
    blocked(event);
    select(model, 0.5, 0.5);
  } else if (model && step && event.shiftKey) {
    blocked(event);
    figures.get(model).port.scrollBy(80 * step[1], 80 * step[0]);
  } else if (step && view.kind === "patch" && patches[models[0]]) {
    blocked(event);
    const near = patches[models[0]], clip = (x, count) => Math.min(Math.max(x, 0), count - 1);
    look({kind: "patch", row: clip(view.row + step[0], near.h), column: clip(view.column + step[1], near.w)}).then(() => view.kind === "patch" && reveal());
  }
};
new ResizeObserver(layout).observe($("views"));

// Examples: thumbnails in a row or column, fetched two at a time when they come into view.
const visible = new Set();
let fetching = 0;
async function thumbnails() {
  const [button] = visible;
  if (!button || fetching >= 2) return;
  visible.delete(button);
  seen.unobserve(button);
  fetching++;
  thumbnails();
  try {
    const picture = make("img");
    [picture.src, picture.alt] = [URL.createObjectURL(await api(`/api/thumbnail/${button.dataset.number}`, undefined, null)), ""];
    button.querySelector("b").replaceWith(picture);
  } catch { button.title += " (cannot be read)"; }
  fetching--;
  thumbnails();
}
const seen = new IntersectionObserver(entries => {
  for (const {target, isIntersecting} of entries) if (isIntersecting) visible.add(target); else visible.delete(target);
  thumbnails();
}, {root: $("strip"), rootMargin: "200px"});
let offered = "";  // words of an example, not typed by the user
async function show(button) {
  const example = info.examples[button.dataset.number];
  return attempt(async () => {
    if (example.words && ["", offered].includes($("words").value)) $("words").value = offered = example.words;
    await load(() => api(`/api/example/${button.dataset.number}`), example.name);
    button.setAttribute("aria-current", true);
  }, `Opening ${example.name} ...`);
}
function examples() {
  const buttons = info.examples.map((example, i) => {
    const button = make("button", make("b"), make("span", example.name));
    [button.dataset.number, button.title, button.tabIndex] = [i, example.name, i ? -1 : 0];
    button.onclick = () => show(button);
    button.onfocus = () => { for (const x of buttons) x.tabIndex = x === button ? 0 : -1; };
    seen.observe(button);
    return button;
  });
  $("strip").append(...buttons);
  $("examples").hidden = !buttons.length;
  $("search").hidden = buttons.length < 9;
  const found = () => buttons.filter(x => !x.hidden);
  $("search").oninput = () => {
    const parts = $("search").value.toLowerCase().split(/\s+/);
    for (const x of buttons) x.hidden = !parts.every(part => x.title.toLowerCase().includes(part));
    for (const x of buttons) x.tabIndex = -1;
    if (found().length) found()[0].tabIndex = 0;
    $("count").textContent = `${found().length} of ${buttons.length}`;
  };
  if (buttons.length >= 9) $("count").textContent = `${buttons.length} examples`;
  $("search").onkeydown = event => { if (event.key === "Enter" && found().length) found()[0].click(); };
  $("strip").onkeydown = event => {
    const all = found(), at = all.indexOf(document.activeElement);
    const to = {ArrowLeft: at - 1, ArrowUp: at - 1, ArrowRight: at + 1, ArrowDown: at + 1, Home: 0, End: all.length - 1}[event.key];
    if (to === undefined) return;
    blocked(event);
    all[Math.min(Math.max(to, 0), all.length - 1)]?.focus();
  };
  return buttons;
}

// The theme follows the system until the button is used.
const stored = (value) => { try { if (value) localStorage.setItem("theme", value); return localStorage.getItem("theme"); } catch { return value; } };
const system = matchMedia("(prefers-color-scheme: dark)");
function theme(chosen) {
  const dark = (chosen || (system.matches ? "dark" : "light")) === "dark";
  document.documentElement.dataset.theme = dark ? "dark" : "light";
  $("theme").textContent = dark ? "Light" : "Dark";
  $("theme").setAttribute("aria-label", dark ? "Use the light theme" : "Use the dark theme");
}
theme(stored());
system.onchange = () => theme(stored());
$("theme").onclick = () => theme(stored(document.documentElement.dataset.theme === "dark" ? "light" : "dark"));
if (!matchMedia("(min-width: 900px)").matches) $("more").open = false;

attempt(async () => {
  info = await api("/api/info");
  document.title = `${info.name}: pacl serve`;
  $("name").textContent = `${info.name} (${info.models.join(", ")})`;
  models = [info.models[0]];
  const choices = info.models.length < 2 ? [] : [...info.models.map(x => [x]), info.models];
  for (const choice of choices) {
    const input = make("input");
    [input.type, input.name, input.checked] = ["radio", "model", choice.length === 1 && choice[0] === models[0]];
    input.onchange = () => { models = choice; attempt(refresh); };
    $("models").append(make("label", input, ` ${choice.join(" and ")}`));
  }
  $("words").value = new URLSearchParams(location.hash.slice(1)).get("words") || "";
  describe();
  for (const button of examples().slice(0, 5)) {  // the first that can be read
    await show(button);
    if (bitmap) break;
  }
});
