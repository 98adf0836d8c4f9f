// Shows a reconstruction: moving coloured points, tracks with fading trails, cameras. WebGL 2, or a plain canvas.
// The data are made by page.py, which documents them. Vectors are arrays; matrices are columns one after the other.
"use strict";

const $ = id => document.getElementById(id);
window.onerror = message => {
  $("problem").hidden = false;
  $("problem").textContent = document.documentElement.dataset.error = message;
};

// ---- data ----------------------------------------------------------------------------------------------------------

const data = JSON.parse($("data").textContent);
const bytes = text => Uint8Array.from(atob(text), letter => letter.charCodeAt(0)).buffer;
const cloud = {
  positions: new Uint16Array(bytes(data.cloud.positions)), // x y z of each point, the points of frame 0 first
  colours: new Uint8Array(bytes(data.cloud.colours)), // r g b, size
  starts: data.cloud.starts, // the points of frame t are number starts[t] to starts[t + 1]
};
const tracks = {
  positions: new Uint16Array(bytes(data.tracks.positions)), // x y z state, frame by frame; state 0 is unknown, full is visible
  colours: new Uint8Array(bytes(data.tracks.colours)), // r g b 255
  count: data.tracks.count,
};
const { cameras, low, span, sizes, frames, fps } = data;
const pictures = { video: data.video.map(load), depth: data.depth.map(load) };

function load(text) {
  const image = new Image();
  image.onload = draw; // the picture of the frame on show may come late
  image.src = "data:image/jpeg;base64," + text;
  return image;
}

// ---- vectors and matrices ------------------------------------------------------------------------------------------

const add = (a, b, scale = 1) => a.map((x, i) => x + scale * b[i]);
const dot = (a, b) => a.reduce((sum, x, i) => sum + x * b[i], 0);
const combine = (axes, weights) => axes[0].map((_, i) => dot(axes.map(axis => axis[i]), weights));
const axesOf = camera => [0, 4, 8].map(i => camera.pose.slice(i, i + 3)); // right, down, forward in the world
const centreOf = camera => camera.pose.slice(12, 15);

function multiply(a, b) {
  const out = new Float32Array(16);
  for (let i = 0; i < 16; i++) for (let k = 0; k < 4; k++) out[i] += a[4 * k + (i & 3)] * b[(i & 12) + k];
  return out;
}

function viewMatrix(eye, right, up, back) {
  const rows = [right, up, back];
  return [...[0, 1, 2].flatMap(i => [...rows.map(row => row[i]), 0]), ...rows.map(row => -dot(row, eye)), 1];
}

function projection(fx, fy, near, far) {
  return [fx, 0, 0, 0, 0, fy, 0, 0, 0, 0, (far + near) / (near - far), -1, 0, 0, (2 * far * near) / (near - far), 0];
}

// ---- state and view ------------------------------------------------------------------------------------------------

const state = { frame: 0, playing: false, cloud: "frame", tracks: 0, trail: 0, size: 1, cameras: true, follow: false };
const first = axesOf(cameras[0]);
const upright = [first[0], first[1].map(x => -x), first[2].map(x => -x)]; // right, up, back
const nearest = 0.02 * data.distance;
let orbit;

function resetView() {
  // from behind, above and beside the first camera, towards what it sees
  orbit = { target: add(centreOf(cameras[0]), first[2], data.distance), yaw: 0.32, pitch: 0.2, distance: 1.5 * data.distance };
  state.follow = false;
}

function orbitAxes() {
  const [cy, sy, cp, sp] = [Math.cos(orbit.yaw), Math.sin(orbit.yaw), Math.cos(orbit.pitch), Math.sin(orbit.pitch)];
  const local = [[cy, 0, -sy], [-sy * sp, cp, -cy * sp], [sy * cp, sp, cy * cp]]; // right, up, back
  return local.map(axis => combine(upright, axis));
}

function currentView(width, height) {
  const near = nearest, far = 3000 * nearest;
  if (state.follow) {
    const camera = cameras[state.frame], [right, down, forward] = axesOf(camera);
    const aspect = camera.fy / camera.fx, shrink = Math.min(1, width / height / aspect);
    const fy = 2 * camera.fy * shrink * 0.96, eye = centreOf(camera);
    const view = viewMatrix(eye, right, down.map(x => -x), forward.map(x => -x));
    return { matrix: multiply(projection((fy * height) / width, fy, near, far), view), pixels: (fy * height) / 2 };
  }
  const [right, up, back] = orbitAxes();
  const eye = add(orbit.target, back, orbit.distance);
  const fy = 2.1 * Math.min(1, width / height / 1.1);
  const matrix = multiply(projection((fy * height) / width, fy, near, far), viewMatrix(eye, right, up, back));
  return { matrix, pixels: (fy * height) / 2 };
}

// The lines of the cameras: [from, to, colour, width], colours 0..1 with alpha.
function cameraLines() {
  const lines = [], every = Math.ceil(frames / 16);
  for (let t = 0; t < frames; t++) {
    const now = t === state.frame, done = t <= state.frame;
    if (t) lines.push([centreOf(cameras[t - 1]), centreOf(cameras[t]), done ? [1, 0.72, 0.33, 0.9] : [1, 1, 1, 0.3], done ? 2 : 1.2]);
    if (t % every && !now) continue;
    const corners = frustum(t, now ? 1 : 0.55), centre = centreOf(cameras[t]);
    const colour = now ? [1, 0.72, 0.33, 1] : [0.62, 0.72, 0.9, 0.3], width = now ? 2.2 : 1.1;
    corners.forEach((corner, i) => lines.push([centre, corner, colour, width], [corner, corners[(i + 1) % 4], colour, width]));
  }
  return lines;
}

function frustum(t, scale) {
  const camera = cameras[t], depth = scale * data.frustum;
  return [[0, 0], [1, 0], [1, 1], [0, 1]].map(([u, v]) =>
    add(centreOf(camera), combine(axesOf(camera), [((u - camera.cx) / camera.fx) * depth, ((v - camera.cy) / camera.fy) * depth, depth])));
}

// ---- WebGL ---------------------------------------------------------------------------------------------------------

const POINT_VERTEX = `#version 300 es
uniform mat4 matrix; uniform vec3 low; uniform float span, pixels, fixedSize, lift; uniform vec2 sizes;
layout(location=0) in vec4 position; layout(location=1) in vec4 colour;
out vec4 ink; out float radius;
void main() {
  gl_Position = position.w < .25 ? vec4(2, 2, 2, 1) : matrix * vec4(low + span * position.xyz, 1);
  gl_Position.z -= lift;
  float size = fixedSize > 0. ? fixedSize : exp(mix(sizes.x, sizes.y, colour.a)) * pixels / gl_Position.w;
  gl_PointSize = clamp(size, 1.2, 64.);
  radius = .5 * gl_PointSize;
  ink = vec4(colour.rgb, fixedSize > 0. && position.w < .75 ? .3 : 1.);
}`;
const POINT_FRAGMENT = `#version 300 es
precision highp float;
uniform float fixedSize;
in vec4 ink; in float radius; out vec4 result;
void main() {
  float edge = radius * (1. - length(2. * gl_PointCoord - 1.));
  float rim = fixedSize > 0. ? smoothstep(0., 1.5, edge - .8) : 1.;
  result = vec4(ink.rgb * mix(.12, 1., rim), ink.a * (radius < 1.5 ? 1. : clamp(edge + .5, 0., 1.)));
  if (result.a < .02) discard;
}`;
const LINE_VERTEX = `#version 300 es
uniform mat4 matrix; uniform vec3 low; uniform vec2 viewport; uniform float span, alpha, width, lift;
layout(location=0) in vec4 start; layout(location=1) in vec4 end; layout(location=2) in vec4 colour;
out vec4 ink;
void main() {
  vec4 a = matrix * vec4(low + span * start.xyz, 1), b = matrix * vec4(low + span * end.xyz, 1);
  float near = 1e-3 * (abs(a.w) + abs(b.w));
  if (min(start.w, end.w) < .25 || max(a.w, b.w) < near) { gl_Position = vec4(2, 2, 2, 1); return; }
  if (a.w < near) a = mix(a, b, (near - a.w) / (b.w - a.w));
  if (b.w < near) b = mix(b, a, (near - b.w) / (a.w - b.w));
  vec2 along = (b.xy / b.w - a.xy / a.w) * viewport + vec2(1e-5, 0);
  vec2 aside = normalize(vec2(-along.y, along.x)) * width / viewport;
  gl_Position = (gl_VertexID & 1) == 0 ? a : b;
  gl_Position.xy += aside * (gl_VertexID < 2 ? -1. : 1.) * gl_Position.w;
  gl_Position.z -= lift;
  ink = vec4(colour.rgb, colour.a * alpha * (min(start.w, end.w) < .75 ? .3 : 1.));
}`;
const LINE_FRAGMENT = `#version 300 es
precision highp float;
in vec4 ink; out vec4 result;
void main() { result = ink; }`;
const PICTURE_VERTEX = `#version 300 es
uniform mat4 matrix; uniform vec3 corners[4]; out vec2 place;
void main() {
  int corner = gl_VertexID < 2 ? gl_VertexID : 5 - gl_VertexID;  // a strip: 0 1 3 2
  place = vec2(corner == 1 || corner == 2, corner > 1);
  gl_Position = matrix * vec4(corners[corner], 1);
}`;
const PICTURE_FRAGMENT = `#version 300 es
precision highp float;
uniform sampler2D picture; in vec2 place; out vec4 result;
void main() { result = vec4(texture(picture, place).rgb, .8); }`;

class WebGL {
  constructor(gl) {
    this.gl = gl;
    this.points = this.program(POINT_VERTEX, POINT_FRAGMENT);
    this.lines = this.program(LINE_VERTEX, LINE_FRAGMENT);
    this.picture = this.program(PICTURE_VERTEX, PICTURE_FRAGMENT);
    this.buffers = {};
    for (const [name, array] of [["cloud", cloud.positions], ["cloudColours", cloud.colours],
      ["tracks", tracks.positions], ["trackColours", tracks.colours], ["cameras", null]]) {
      this.buffers[name] = gl.createBuffer();
      gl.bindBuffer(gl.ARRAY_BUFFER, this.buffers[name]);
      if (array) gl.bufferData(gl.ARRAY_BUFFER, array, gl.STATIC_DRAW);
    }
    this.texture = gl.createTexture();
    gl.bindTexture(gl.TEXTURE_2D, this.texture);
    gl.texParameteri(gl.TEXTURE_2D, gl.TEXTURE_MIN_FILTER, gl.LINEAR);
    gl.texParameteri(gl.TEXTURE_2D, gl.TEXTURE_WRAP_S, gl.CLAMP_TO_EDGE);
    gl.texParameteri(gl.TEXTURE_2D, gl.TEXTURE_WRAP_T, gl.CLAMP_TO_EDGE);
    gl.enable(gl.DEPTH_TEST);
    gl.depthFunc(gl.LEQUAL);
    gl.blendFunc(gl.SRC_ALPHA, gl.ONE_MINUS_SRC_ALPHA);
    gl.clearColor(0.043, 0.055, 0.082, 1);
  }

  program(vertex, fragment) {
    const gl = this.gl, program = gl.createProgram(), uniforms = {};
    for (const [type, source] of [[gl.VERTEX_SHADER, vertex], [gl.FRAGMENT_SHADER, fragment]]) {
      const shader = gl.createShader(type);
      gl.shaderSource(shader, source);
      gl.compileShader(shader);
      if (!gl.getShaderParameter(shader, gl.COMPILE_STATUS) && !gl.isContextLost()) throw Error(gl.getShaderInfoLog(shader));
      gl.attachShader(program, shader);
    }
    gl.linkProgram(program);
    if (!gl.getProgramParameter(program, gl.LINK_STATUS) && !gl.isContextLost()) throw Error(gl.getProgramInfoLog(program));
    for (let i = 0; i < gl.getProgramParameter(program, gl.ACTIVE_UNIFORMS); i++) {
      const name = gl.getActiveUniform(program, i).name.replace("[0]", "");
      uniforms[name] = gl.getUniformLocation(program, name);
    }
    return { program, uniforms };
  }

  use({ program, uniforms }, values) {
    this.gl.useProgram(program);
    for (const [name, value] of Object.entries(values)) {
      if (name === "matrix") this.gl.uniformMatrix4fv(uniforms[name], false, value);
      else this.gl[`uniform${name === "corners" ? 3 : value.length || 1}fv`](uniforms[name], [value].flat(2));
    }
  }

  attribute(index, buffer, size, type, offset, stride = 0, divisor = 0) {
    const gl = this.gl;
    gl.bindBuffer(gl.ARRAY_BUFFER, this.buffers[buffer]);
    gl.enableVertexAttribArray(index);
    gl.vertexAttribPointer(index, size, type, true, stride, offset);
    gl.vertexAttribDivisor(index, divisor);
  }

  draw(width, height) {
    const gl = this.gl, { matrix, pixels } = currentView(width, height), ratio = width / $("view").clientWidth;
    gl.viewport(0, 0, width, height);
    gl.clear(gl.COLOR_BUFFER_BIT | gl.DEPTH_BUFFER_BIT);
    gl.disable(gl.BLEND);
    gl.enable(gl.SAMPLE_ALPHA_TO_COVERAGE);
    this.use(this.points, { matrix, low, span, sizes, pixels: pixels * state.size, fixedSize: 0, lift: 0 });
    this.attribute(0, "cloud", 3, gl.UNSIGNED_SHORT, 0);
    this.attribute(1, "cloudColours", 4, gl.UNSIGNED_BYTE, 0);
    const [from, to] = cloudRange();
    if (to > from) gl.drawArrays(gl.POINTS, from, to - from);
    gl.disable(gl.SAMPLE_ALPHA_TO_COVERAGE);
    gl.enable(gl.BLEND);
    gl.depthMask(false);
    if (state.cameras && !state.follow) this.drawCameras(matrix, [width, height], ratio);
    if (state.tracks) this.drawTracks(matrix, [width, height], ratio);
    gl.depthMask(true);
  }

  drawCameras(matrix, viewport, ratio) {
    const gl = this.gl, image = pictures.video[state.frame];
    if (image.complete && image.width) {
      gl.bindTexture(gl.TEXTURE_2D, this.texture);
      gl.texImage2D(gl.TEXTURE_2D, 0, gl.RGB, gl.RGB, gl.UNSIGNED_BYTE, image);
      this.use(this.picture, { matrix, corners: frustum(state.frame, 1) });
      gl.drawArrays(gl.TRIANGLE_STRIP, 0, 4);
    }
    for (const bold of [false, true]) {
      const lines = cameraLines().filter(line => line[3] >= 2 === bold);
      if (!lines.length) continue;
      gl.bindBuffer(gl.ARRAY_BUFFER, this.buffers.cameras);
      gl.bufferData(gl.ARRAY_BUFFER, new Float32Array(lines.flatMap(([a, b, colour]) => [...a, 1, ...b, 1, ...colour])), gl.STREAM_DRAW);
      this.use(this.lines, { matrix, low: [0, 0, 0], span: 1, lift: 0, viewport, alpha: 1, width: (bold ? 2.2 : 1.2) * ratio });
      for (let i = 0; i < 3; i++) this.attribute(i, "cameras", 4, gl.FLOAT, 16 * i, 48, 1);
      gl.drawArraysInstanced(gl.TRIANGLE_STRIP, 0, 4, lines.length);
    }
  }

  drawTracks(matrix, viewport, ratio) {
    const gl = this.gl, row = 8 * tracks.count;
    const lift = 0.03 * nearest; // in clip space: as if 1.5 % nearer, so that the cloud does not swallow its own tracks
    for (let t = Math.max(0, state.frame - state.trail); t < state.frame; t++) {
      const fresh = 1 - (state.frame - 1 - t) / state.trail; // 1 at the head, almost 0 at the tail
      this.use(this.lines, { matrix, low, span, lift, viewport, alpha: 0.9 * fresh, width: (0.8 + 1.6 * fresh) * ratio });
      this.attribute(0, "tracks", 4, gl.UNSIGNED_SHORT, row * t, 0, 1);
      this.attribute(1, "tracks", 4, gl.UNSIGNED_SHORT, row * (t + 1), 0, 1);
      this.attribute(2, "trackColours", 4, gl.UNSIGNED_BYTE, 0, 0, 1);
      gl.drawArraysInstanced(gl.TRIANGLE_STRIP, 0, 4, state.tracks);
    }
    this.use(this.points, { matrix, low, span, sizes, lift, pixels: 1, fixedSize: 8 * ratio });
    this.attribute(0, "tracks", 4, gl.UNSIGNED_SHORT, row * state.frame);
    this.attribute(1, "trackColours", 4, gl.UNSIGNED_BYTE, 0);
    gl.drawArrays(gl.POINTS, 0, state.tracks);
  }
}

function cloudRange() {
  const { starts } = cloud, all = state.cloud === "all";
  return state.cloud === "none" ? [0, 0] : all ? [0, starts[frames]] : [starts[state.frame], starts[state.frame + 1]];
}

// ---- the same without WebGL ----------------------------------------------------------------------------------------

class Plain {
  constructor(context) { this.context = context; }

  draw(width, height) {
    const { matrix: m, pixels } = currentView(width, height), context = this.context;
    const image = context.createImageData(width, height), ink = new Uint32Array(image.data.buffer).fill(0xff150e0b);
    const depths = new Float32Array(width * height).fill(Infinity);
    const [from, to] = cloudRange();
    for (let i = from; i < to; i++) {
      const [column, row, w] = this.project(m, place(cloud.positions, 3 * i), width, height);
      if (w <= 0) continue;
      const log = sizes[0] + ((sizes[1] - sizes[0]) * cloud.colours[4 * i + 3]) / 255;
      const half = Math.min(12, Math.max(0.5, (0.5 * state.size * Math.exp(log) * pixels) / w));
      const colour = 0xff000000 | (cloud.colours[4 * i + 2] << 16) | (cloud.colours[4 * i + 1] << 8) | cloud.colours[4 * i];
      const [left, right] = [Math.max(0, Math.round(column - half)), Math.min(width, Math.round(column + half))];
      for (let y = Math.max(0, Math.round(row - half)), end = Math.min(height, Math.round(row + half)); y < end; y++)
        for (let x = left, k = y * width + left; x < right; x++, k++) if (w < depths[k]) { depths[k] = w; ink[k] = colour; }
    }
    context.putImageData(image, 0, 0);
    if (state.cameras && !state.follow) for (const [a, b, colour, thick] of cameraLines()) {
      const [r, g, blue] = colour.map(x => 255 * x);
      this.line(this.project(m, a, width, height), this.project(m, b, width, height), `rgba(${r},${g},${blue},${colour[3]})`, thick);
    }
    for (let k = 0; k < state.tracks; k++) this.track(m, k, width, height);
  }

  track(m, k, width, height) {
    const [r, g, b] = tracks.colours.subarray(4 * k), at = t => 4 * (t * tracks.count + k);
    const known = t => tracks.positions[at(t) + 3] > 0, where = t => this.project(m, place(tracks.positions, at(t)), width, height);
    for (let t = Math.max(0, state.frame - state.trail); t < state.frame; t++)
      if (known(t) && known(t + 1))
        this.line(where(t), where(t + 1), `rgba(${r},${g},${b},${1 - (state.frame - 1 - t) / state.trail})`, 1.5);
    const [x, y, w] = where(state.frame);
    if (!known(state.frame) || w <= 0) return;
    this.context.fillStyle = `rgba(${r},${g},${b},${tracks.positions[at(state.frame) + 3] < 50000 ? 0.3 : 1})`;
    this.context.fillRect(x - 2.5, y - 2.5, 5, 5);
  }

  project(m, [x, y, z], width, height) {
    const w = m[3] * x + m[7] * y + m[11] * z + m[15];
    const a = (m[0] * x + m[4] * y + m[8] * z + m[12]) / w, b = (m[1] * x + m[5] * y + m[9] * z + m[13]) / w;
    return [(0.5 + 0.5 * a) * width, (0.5 - 0.5 * b) * height, w];
  }

  line(a, b, style, thick) {
    if (a[2] <= 0 || b[2] <= 0) return;
    Object.assign(this.context, { strokeStyle: style, lineWidth: thick });
    this.context.beginPath();
    this.context.moveTo(a[0], a[1]);
    this.context.lineTo(b[0], b[1]);
    this.context.stroke();
  }
}

const place = (positions, i) => [0, 1, 2].map(axis => low[axis] + (span * positions[i + axis]) / 65535);

// ---- pictures in the corner ----------------------------------------------------------------------------------------

function drawPictures() {
  for (const name of ["video", "depth"]) {
    const image = pictures[name][state.frame], canvas = $(name);
    if (!image.complete || !image.width) continue;
    const scale = Math.max(1, Math.ceil(456 / image.width));
    [canvas.width, canvas.height] = [scale * image.width, scale * image.height];
    const context = canvas.getContext("2d");
    context.imageSmoothingEnabled = name === "video";
    context.drawImage(image, 0, 0, canvas.width, canvas.height);
    if (name === "video") for (let k = 0; k < Math.min(state.tracks, 200); k++) drawTrackOnVideo(context, k, canvas.width, canvas.height);
  }
}

function drawTrackOnVideo(context, k, width, height) {
  const [r, g, b] = tracks.colours.subarray(4 * k), path = [];
  for (let t = Math.max(0, state.frame - state.trail); t <= state.frame; t++) {
    const i = 4 * (t * tracks.count + k), camera = cameras[t];
    const offset = add(place(tracks.positions, i), centreOf(camera), -1);
    const [x, y, z] = axesOf(camera).map(axis => dot(axis, offset));
    if (tracks.positions[i + 3] < 50000 || z <= 0) { path.length = 0; continue; } // not visible: the trail starts anew
    const square = (x * x + y * y) / (z * z), bend = 1 + square * (camera.k1 + square * camera.k2);
    path.push([width * (camera.cx + (camera.fx * bend * x) / z), height * (camera.cy + (camera.fy * bend * y) / z)]);
  }
  if (!path.length) return;
  Object.assign(context, { strokeStyle: `rgba(${r},${g},${b},.8)`, fillStyle: `rgb(${r},${g},${b})`, lineWidth: 1.5 });
  context.beginPath();
  path.forEach(([x, y], i) => (i ? context.lineTo(x, y) : context.moveTo(x, y)));
  context.stroke();
  context.beginPath();
  context.arc(...path[path.length - 1], 2.6, 0, 2 * Math.PI);
  context.fill();
}

// ---- what the user does --------------------------------------------------------------------------------------------

const canvas = $("view");
const gl = canvas.getContext("webgl2", { antialias: true, alpha: false, powerPreference: "high-performance" });
const renderer = gl ? new WebGL(gl) : new Plain(canvas.getContext("2d"));
let requested = false;

function draw() {
  if (requested) return;
  requested = true;
  requestAnimationFrame(() => {
    requested = false;
    const ratio = gl ? Math.min(2, devicePixelRatio) : 1;
    const [width, height] = [canvas.clientWidth, canvas.clientHeight].map(x => Math.max(1, Math.round(x * ratio)));
    if (canvas.width !== width || canvas.height !== height) [canvas.width, canvas.height] = [width, height];
    renderer.draw(width, height);
    drawPictures();
    Object.assign(document.documentElement.dataset, { frame: state.frame, renderer: renderer.constructor.name });
  });
}

function show(change) {
  Object.assign(state, change);
  state.frame = Math.min(frames - 1, Math.max(0, Math.round(state.frame) || 0));
  $("frame").value = state.frame;
  $("number").textContent = `${state.frame + 1} / ${frames}`;
  $("play").querySelector("path").setAttribute("d", state.playing ? "M3 2h4v12H3zM9 2h4v12H9z" : "M4 1.5l10 6.5-10 6.5z");
  for (const button of $("cloud").children) button.setAttribute("aria-pressed", button.value === state.cloud);
  for (const name of ["cameras", "follow"]) $(name).setAttribute("aria-pressed", state[name]);
  for (const name of ["size", "tracks", "trail"]) $(name).value = state[name];
  draw();
}

let before = 0, owed = 0;
function tick(now) {
  if (!state.playing) return;
  owed += ((now - before) / 1000) * fps * Number($("speed").value);
  before = now;
  const steps = Math.floor(owed);
  owed -= steps;
  if (steps) show({ frame: (state.frame + steps) % frames });
  requestAnimationFrame(tick);
}

function play(playing) {
  before = performance.now();
  owed = 0;
  show({ playing: playing && frames > 1 });
  requestAnimationFrame(tick);
}

const step = by => show({ playing: false, frame: (state.frame + by + frames) % frames });
const reset = () => { resetView(); show({}); };
$("play").onclick = () => play(!state.playing);
$("frame").oninput = event => show({ playing: false, frame: event.target.valueAsNumber });
for (const name of ["size", "tracks", "trail"]) $(name).oninput = event => show({ [name]: event.target.valueAsNumber });
for (const name of ["cameras", "follow"]) $(name).onclick = () => show({ [name]: !state[name] });
for (const button of $("cloud").children) button.onclick = () => show({ cloud: button.value });
$("reset").onclick = reset;
window.onkeydown = event => {
  const actions = { " ": () => play(!state.playing), ArrowLeft: () => step(-1), ArrowRight: () => step(1), Home: () => show({ frame: 0 }),
    End: () => show({ frame: frames - 1 }), c: () => show({ follow: !state.follow }), r: reset };
  const action = actions[event.key];
  if (!action || event.ctrlKey || event.metaKey || event.altKey || event.target.matches("select")) return;
  event.preventDefault();
  action();
};

const fingers = new Map();
const spread = ([a, b]) => Math.hypot(a.x - b.x, a.y - b.y);
function move(dx, dy) {
  const [right, up] = orbitAxes(), unit = (2 * orbit.distance) / (2.1 * canvas.clientHeight);
  orbit.target = add(add(orbit.target, right, -dx * unit), up, dy * unit);
}
const zoom = factor => { orbit.distance = Math.min(20, Math.max(0.02, (orbit.distance * factor) / data.distance)) * data.distance; };
canvas.onpointerdown = event => {
  canvas.setPointerCapture(event.pointerId);
  fingers.set(event.pointerId, { x: event.clientX, y: event.clientY });
};
canvas.onpointermove = event => {
  const finger = fingers.get(event.pointerId);
  if (!finger) return;
  const dx = event.clientX - finger.x, dy = event.clientY - finger.y, apart = fingers.size === 2 && spread([...fingers.values()]);
  Object.assign(finger, { x: event.clientX, y: event.clientY });
  if (fingers.size === 2) {
    move(dx / 2, dy / 2);
    zoom(apart / spread([...fingers.values()]));
  } else if (event.buttons & 6 || event.shiftKey) move(dx, dy);
  else {
    orbit.yaw -= 0.006 * dx;
    orbit.pitch = Math.min(1.55, Math.max(-1.55, orbit.pitch + 0.006 * dy));
  }
  show({ follow: false });
};
canvas.onpointerup = canvas.onpointercancel = event => fingers.delete(event.pointerId);
canvas.oncontextmenu = event => event.preventDefault();
canvas.addEventListener("wheel", event => {
  event.preventDefault();
  zoom(Math.exp(0.0012 * event.deltaY * (event.deltaMode ? 30 : 1)));
  show({ follow: false });
}, { passive: false });
canvas.addEventListener("webglcontextlost", () => { throw Error("the browser took the 3-D context away; reload the page"); });
window.onresize = draw;

// The address can say what to show: #frame=3&cloud=all&play=1
function fromAddress() {
  const wanted = new URLSearchParams(location.hash.slice(1)), change = {};
  for (const [name, value] of wanted) {
    if (["frame", "size", "tracks", "trail"].includes(name) && value !== "" && isFinite(value)) change[name] = Number(value);
    if (["cameras", "follow"].includes(name)) change[name] = value === "1";
    if (name === "cloud" && ["none", "frame", "all"].includes(value)) change[name] = value;
  }
  change.tracks = Math.min(tracks.count, Math.max(0, change.tracks ?? state.tracks));
  show(change);
  play(wanted.get("play") === "1" || (!wanted.has("frame") && state.playing));
}

$("frame").max = frames - 1;
$("tracks").max = tracks.count;
resetView();
show({ tracks: Math.min(tracks.count, 500), trail: Math.min(12, Math.max(4, frames)), size: 1.1, playing: frames > 1 });
fromAddress();
window.onhashchange = fromAddress;
document.documentElement.dataset.state = "ready";
