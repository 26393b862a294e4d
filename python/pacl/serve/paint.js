"use strict";
// Geometry and colours: from the numbers of an answer to pixels. Nothing here reads or changes the page.
const PIXELS = 4e6, MAP_PIXELS = 4e5, LEAST_SIDE = 480, MOST_SIDE = 8192;  // sizes of the picture and of a map

function scaled(width, height, pixels) {  // the size of a drawing: at most so many pixels, small images enlarged
  const long = Math.max(width, height);
  const factor = Math.min(Math.max(1, LEAST_SIDE / long), Math.sqrt(pixels / (width * height)), MOST_SIDE / long);
  return [width, height].map(x => Math.max(1, Math.round(x * factor)));
}
// Bilinear sampling positions between the centres of cells, the same as in Dense.enlarged.
function places(count, length, margin) {
  const pad = Math.round(margin * length), inner = length - 2 * pad;
  return Array.from({length}, (_, i) => {
    const at = Math.min(Math.max((i - pad + 0.5) * count / inner - 0.5, 0), count - 1);
    const low = Math.min(Math.floor(at), Math.max(0, count - 2));
    return [low, Math.min(low + 1, count - 1), at - low];
  });
}
function enlarge(values, grid, width, height) {
  const rows = places(grid.h, height, grid.margins[0]), columns = places(grid.w, width, grid.margins[1]);
  const lefts = Int32Array.from(columns, x => x[0]), rights = Int32Array.from(columns, x => x[1]);
  const shares = Float64Array.from(columns, x => x[2]), line = new Float64Array(grid.w);
  const out = new Float32Array(width * height);
  for (let y = 0; y < height; y++) {
    const [a, b, t] = rows[y];
    for (let x = 0; x < grid.w; x++) line[x] = values[a * grid.w + x] * (1 - t) + values[b * grid.w + x] * t;
    for (let x = 0, i = y * width; x < width; x++, i++) out[i] = line[lefts[x]] * (1 - shares[x]) + line[rights[x]] * shares[x];
  }
  return out;
}
function heat(value, [low, high], magma) {
  const at = Math.min(Math.max((value - low) / (high - low), 0), 1) * (magma.length - 1);
  const i = Math.min(Math.floor(at), magma.length - 2);
  return magma[i].map((x, c) => x + (magma[i + 1][c] - x) * (at - i));
}
function cell(grid, u, v) {  // row and column at a point of the image, 0 to 1 along each side
  const one = (t, count, margin) => Math.min(Math.max(Math.floor((t - margin) / (1 - 2 * margin) * count), 0), count - 1);
  return [one(v, grid.h, grid.margins[0]), one(u, grid.w, grid.margins[1])];
}
function box(grid, row, column) {  // the cell's left, top, width and height as shares of the image
  const [top, left] = grid.margins, high = (1 - 2 * top) / grid.h, wide = (1 - 2 * left) / grid.w;
  return [left + column * wide, top + row * high, wide, high];
}
function painted(width, height, colour) {  // a canvas with the colour of each pixel, or none for null
  const canvas = Object.assign(document.createElement("canvas"), {width, height});
  const context = canvas.getContext("2d"), data = context.createImageData(width, height);
  for (let i = 0; i < width * height; i++) {
    const over = colour(i);
    if (over) [data.data[4 * i], data.data[4 * i + 1], data.data[4 * i + 2], data.data[4 * i + 3]] = [...over, 255];
  }
  context.putImageData(data, 0, 0);
  return canvas;
}
function heatMap(values, grid, scale, magma, width, height) {
  const table = Array.from({length: 512}, (_, i) => heat(i / 511, [0, 1], magma).map(Math.round));
  const large = enlarge(values, grid, width, height), [low, high] = scale;
  return painted(width, height, i => table[Math.round(Math.min(Math.max((large[i] - low) / (high - low), 0), 1) * 511)]);
}
function wordMap(answer, threshold, width, height) {  // the colour of each pixel's best word
  const best = new Float32Array(width * height).fill(-Infinity), label = new Int16Array(width * height);
  answer.scores.forEach((scores, k) => {
    const large = enlarge(scores, answer, width, height);
    for (let i = 0; i < large.length; i++) if (large[i] > best[i]) { best[i] = large[i]; label[i] = k; }
  });
  return painted(width, height, i => threshold !== null && best[i] < threshold ? null : answer.colours[label[i]]);
}
function nearest(near, count) {  // the numbers of the most similar cells
  return near.similarity.map((_, i) => i).sort((a, b) => near.similarity[b] - near.similarity[a]).slice(0, count);
}
function numbers(answer, row, column, scale) {  // [word, cosine, softmax of `scale` times the cosines] at a patch, best first
  const cosines = answer.scores.map(x => x[row * answer.w + column]), most = Math.max(...cosines);
  const weights = cosines.map(x => Math.exp(scale * (x - most))), sum = weights.reduce((a, b) => a + b);
  return cosines.map((x, k) => [answer.words[k], x, weights[k] / sum]).sort((a, b) => b[1] - a[1]);
}
function compose(canvas, bitmap, map, grey, alpha) {  // the image, in grey below a heat map, and the map over it
  const context = canvas.getContext("2d"), {width, height} = canvas;
  Object.assign(context, {globalAlpha: 1, globalCompositeOperation: "source-over", imageSmoothingEnabled: true, fillStyle: "#fff"});
  context.fillRect(0, 0, width, height);
  context.drawImage(bitmap, 0, 0, width, height);
  if (!map) return context;
  if (grey) {
    context.globalCompositeOperation = "saturation";
    context.fillRect(0, 0, width, height);
    context.globalCompositeOperation = "source-over";
  }
  context.globalAlpha = alpha;
  context.imageSmoothingEnabled = grey;  // words keep their own colours at their borders
  context.drawImage(map, 0, 0, width, height);
  context.globalAlpha = 1;
  return context;
}
function frames(context, near, row, column, line) {  // around the nine most similar patches, and the selected one
  const {width, height} = context.canvas, own = row * near.w + column;
  for (const i of [...nearest(near, 9), own]) {
    const [x, y, w, h] = box(near, Math.floor(i / near.w), i % near.w);
    context.strokeStyle = i === own ? "#00e5ff" : "#fff";
    context.lineWidth = line * (i === own ? 3 : 1.5);
    context.strokeRect(x * width, y * height, w * width, h * height);
  }
}
function fitting(context, text, width) {  // as much of a text as the width allows
  if (context.measureText(text).width <= width) return text;
  const letters = [...text];
  while (letters.length && context.measureText(letters.join("") + "…").width > width) letters.pop();
  return letters.join("") + "…";
}
function sheetOf(pictures, entries, stacked) {  // the pictures, [title, canvas] each, over a legend of [colour, word]
  const gap = 8, first = pictures[0][1], side = Math.min(1, Math.sqrt(2e6 / (first.width * first.height)));
  const sizes = pictures.map(([, x]) => [Math.round(x.width * side), Math.round(x.height * side)]);
  const sum = (k, all) => all.reduce((a, x) => a + x[k], 0);
  const width = Math.max(240, stacked ? sizes[0][0] : sum(0, sizes) + gap * (sizes.length - 1));
  const unit = Math.max(1, width / 1600), line = Math.round(24 * unit);  // a wide picture gets large letters
  const columns = Math.max(1, Math.min(entries.length, Math.floor(width / (220 * unit)))), wide = width / columns;
  const below = stacked ? sum(1, sizes) + line * sizes.length : sizes[0][1] + line;
  const rows = Math.ceil(entries.length / columns);
  const out = Object.assign(document.createElement("canvas"), {width, height: below + rows * line + gap});
  const context = out.getContext("2d"), ink = "#1e1e22";
  context.fillStyle = "#fff";
  context.fillRect(0, 0, out.width, out.height);
  context.font = `${15 * unit}px system-ui, sans-serif`;
  let [x, y] = [0, 0];
  pictures.forEach(([title, canvas], k) => {
    context.drawImage(canvas, x, y, ...sizes[k]);
    context.fillStyle = ink;
    context.fillText(title, x + 4, y + sizes[k][1] + 17 * unit);
    if (stacked) y += sizes[k][1] + line; else x += sizes[k][0] + gap;
  });
  entries.forEach(([colour, word], k) => {
    const left = Math.floor(k / rows) * wide, top = below + k % rows * line;
    if (colour) {
      context.fillStyle = `rgb(${colour})`;
      context.fillRect(left + 4, top + 2 * unit, 16 * unit, 16 * unit);
    }
    context.fillStyle = ink;
    context.fillText(fitting(context, word, wide - 36 * unit), left + 28 * unit, top + 15 * unit);
  });
  return out;
}
