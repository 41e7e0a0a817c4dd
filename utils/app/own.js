"use strict";
// An image of one's own, and the hole in it that is to be filled. `model`, `task`, `$`, `make` and `say` are app.js's.

const own = { data: null, picture: null, hole: null, x: 0, y: 0 };

async function takeImage(file) {
  if (!file) return;
  if (file.size > model.limits.upload_bytes / 1.4) return say(`${file.name} is too large to send`, true);
  try {
    own.data = await toBase64(file);
    own.picture = await createImageBitmap(file);
  } catch {
    own.picture = null; // the server may still know its format
  }
  const { width, height } = model.image;
  Object.assign($("own"), { width, height, hidden: false });
  Object.assign(own, { hole: new Uint8Array(width * height), x: width >> 1, y: height >> 1 });
  say(`${file.name} is ready`);
  paintOwn();
}

function paintOwn() {
  const { width, height, channels } = model.image;
  const context = $("own").getContext("2d");
  context.filter = channels === 1 ? "grayscale(1)" : "none";
  context.clearRect(0, 0, width, height);
  if (own.picture) {
    // The middle, as the server cuts it.
    const scale = Math.min(own.picture.width / width, own.picture.height / height);
    const [w, h] = [width * scale, height * scale];
    context.drawImage(own.picture, (own.picture.width - w) / 2, (own.picture.height - h) / 2, w, h, 0, 0, width, height);
  }
  context.filter = "none";
  if (task !== "inpaint") return;
  context.fillStyle = "rgba(255, 80, 0, 0.75)";
  own.hole.forEach((isHole, place) => isHole && context.fillRect(place % width, Math.floor(place / width), 1, 1));
  context.fillStyle = "rgba(0, 200, 255, 0.8)"; // where the keys would paint
  if (document.activeElement === $("own")) context.fillRect(own.x, own.y, 1, 1);
}

function paintHole(x, y) {
  // The pixel under the brush, and those whose middle it covers.
  const { width, height } = model.image;
  const radius = Number($("brush").value) - 0.5;
  const range = (middle, end) => [Math.max(0, Math.floor(middle - radius)), Math.min(end - 1, Math.floor(middle + radius))];
  const [[left, right], [top, bottom]] = [range(x, width), range(y, height)];
  for (let row = top; row <= bottom; row++)
    for (let column = left; column <= right; column++) {
      const isUnder = row === Math.floor(y) && column === Math.floor(x);
      const isNear = Math.hypot(column + 0.5 - x, row + 0.5 - y) <= radius;
      if (isUnder || isNear) own.hole[row * width + column] = $("erase").checked ? 0 : 1;
    }
}

function paintLine(from, to) {
  // A fast pointer is seen at a few places of its way alone.
  const count = Math.ceil(2 * Math.hypot(to[0] - from[0], to[1] - from[1])) || 1;
  for (let step = 1; step <= count; step++)
    paintHole(from[0] + ((to[0] - from[0]) * step) / count, from[1] + ((to[1] - from[1]) * step) / count);
  paintOwn();
}

function makeMask() {
  const { width, height } = model.image;
  const canvas = make("canvas", { width, height });
  const pixels = new ImageData(width, height);
  own.hole.forEach((isHole, place) => pixels.data.set(isHole ? [255, 255, 255, 255] : [0, 0, 0, 255], 4 * place));
  canvas.getContext("2d").putImageData(pixels, 0, 0);
  return canvas.toDataURL("image/png");
}

function listenToBrush() {
  const canvas = $("own");
  let last = null;
  const paint = (event) => {
    if (task !== "inpaint" || !own.hole || !(event.buttons & 1)) return;
    const box = canvas.getBoundingClientRect();
    const place = [((event.clientX - box.left) / box.width) * canvas.width, ((event.clientY - box.top) / box.height) * canvas.height];
    paintLine(last ?? place, place);
    last = place;
  };
  canvas.addEventListener("pointerdown", (event) => {
    canvas.setPointerCapture(event.pointerId);
    last = null;
    paint(event);
  });
  canvas.addEventListener("pointermove", paint);
  for (const name of ["focus", "blur"]) canvas.addEventListener(name, () => own.hole && paintOwn());
  canvas.addEventListener("keydown", (event) => {
    const moves = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1], " ": [0, 0] };
    const move = moves[event.key];
    if (!move || task !== "inpaint") return;
    event.preventDefault();
    own.x = Math.min(Math.max(own.x + move[0], 0), canvas.width - 1);
    own.y = Math.min(Math.max(own.y + move[1], 0), canvas.height - 1);
    if (event.key === " ") paintHole(own.x + 0.5, own.y + 0.5);
    paintOwn();
  });
}
