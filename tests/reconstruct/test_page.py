"""The page: its data, and what a headless Chromium shows of it, with WebGL and without.

Chromium is driven by its command line alone. Where it is missing these tests say so: `apt-get install chromium`.
"""

import base64
import html
import json
import re
import shutil
import subprocess
from dataclasses import replace
from pathlib import Path

import cv2
import numpy as np
import pytest

from fourdperf.reconstruct import Reconstruction
from fourdperf.reconstruct.page import page, write_page
from tests.reconstruct.example import example

WIDTH, HEIGHT = 1000, 600
WEBGL = ["--use-gl=angle", "--use-angle=swiftshader", "--enable-unsafe-swiftshader"]
PLAIN = ["--disable-gpu", "--disable-software-rasterizer", "--disable-3d-apis"]
BROWSERS = ("chromium", "chromium-browser", "google-chrome")
EMPTY = {"points": 0, "point_colors": 0, "point_frame": 0}
NO_TRACKS = {"tracks": 0, "tracks_uv": 0, "tracks_visible": 0, "track_colors": 0, "track_source": 0}


@pytest.fixture
def browse(tmp_path):
    """browse(path, fragment, *flags) runs Chromium and gives (output, console messages)."""
    browser = next(filter(None, map(shutil.which, BROWSERS)), None)
    if browser is None:
        pytest.skip(f"no {', '.join(BROWSERS)} on the PATH; the page was not looked at (apt-get install chromium)")

    def run(path: Path, fragment: str, *flags: str) -> tuple[str, list[str]]:
        profile = tmp_path / "profile"
        options = ["--headless=new", "--no-sandbox", "--hide-scrollbars", "--no-first-run", "--enable-logging=stderr"]
        options += [f"--user-data-dir={profile}", f"--window-size={WIDTH},{HEIGHT}", "--virtual-time-budget=600"]
        command = [browser, *options, *flags, f"{path.as_uri()}#{fragment}"]
        done = subprocess.run(command, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr
        return done.stdout, re.findall(r'CONSOLE[^"]*"(.*)", source', done.stderr)

    return run


@pytest.fixture
def picture(browse, tmp_path):
    """picture(path, fragment, *flags) is a screenshot (HEIGHT, WIDTH, 3); a message on the console is a failure."""

    def take(path: Path, fragment: str, *flags: str) -> np.ndarray:
        shot = tmp_path / "shot.png"
        shot.unlink(missing_ok=True)
        messages = browse(path, fragment, f"--screenshot={shot}", *(flags or WEBGL))[1]
        assert not messages
        return cv2.imread(str(shot), cv2.IMREAD_COLOR_RGB).astype(int)

    return take


TAKE = """
<script>
window.addEventListener("load", () => {
  const shots = WANTED.map(fragment => {
    history.replaceState(null, "", "#" + fragment);
    fromAddress();
    [canvas.width, canvas.height] = SIZE;
    renderer.draw(canvas.width, canvas.height);
    return canvas.toDataURL("image/png").split(",")[1];
  });
  document.body.insertAdjacentHTML("beforeend", "<pre>" + shots.join(" ") + "</pre>");
});
</script>
</body>"""


@pytest.fixture
def scenes(browse, tmp_path):
    """scenes(path, fragments, *flags) is the 3-D view, (HEIGHT, WIDTH, 3) each, from one run of the browser."""

    def take(path: Path, fragments: list[str], *flags: str) -> list[np.ndarray]:
        copy = tmp_path / "copy.html"
        script = TAKE.replace("WANTED", json.dumps(fragments)).replace("SIZE", f"[{WIDTH}, {HEIGHT}]")
        copy.write_text(path.read_text("utf-8").replace("</body>", script), "utf-8")
        text, messages = browse(copy, "frame=0", "--dump-dom", *flags)
        assert not messages
        shots = re.search(r"<pre>([\w+/= ]+)</pre>", text)[1].split()
        decode = lambda shot: cv2.imdecode(np.frombuffer(base64.b64decode(shot), np.uint8), cv2.IMREAD_COLOR_RGB)
        return [decode(shot).astype(int) for shot in shots]

    return take


@pytest.fixture
def look(browse):
    """look(path, fragment, *flags) is what the page says of itself: the data-* attributes of its root."""

    def dump(path: Path, fragment: str = "", *flags: str) -> dict[str, str]:
        text, messages = browse(path, fragment, "--dump-dom", *(flags or WEBGL))
        root = re.search(r"<html[^>]*>", text)[0]
        return dict(re.findall(r'data-(\w+)="([^"]*)"', root)) | {"messages": messages, "text": text}

    return dump


@pytest.fixture(scope="module")
def shown() -> Reconstruction:
    return example(8, 72, 96)


@pytest.fixture(scope="module")
def path(shown, tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("page") / "сцена & page.html"
    write_page(path, shown, title="A <box> & more", table=[["queries/s", "12,345"], ["AbsRel", "0.1 & <b>"]])
    return path


def without(reconstruction: Reconstruction, *groups: dict) -> Reconstruction:
    return replace(reconstruction, **{name: getattr(reconstruction, name)[:0] for group in groups for name in group})


def data_of(text: str) -> dict:
    return json.loads(re.search(r'<script type="application/json" id="data">(.*?)</script>', text, re.S)[1])


def scene(image: np.ndarray) -> np.ndarray:
    """The part of a screenshot that no panel covers."""
    return image[10:510, 300:720]


def filled(image: np.ndarray) -> float:
    """The share of the scene that differs from the background."""
    return float((np.abs(scene(image) - (11, 14, 21)).max(-1) > 8).mean())


# ---- what is in the page -------------------------------------------------------------------------------------------


def test_the_data_hold_the_reconstruction(shown):
    text = page(shown, fps=12)
    data = data_of(text)
    assert (data["frames"], data["fps"], data["tracks"]["count"]) == (8, 12, len(shown.tracks))
    decode = lambda part, dtype, n: np.frombuffer(base64.b64decode(part), dtype).reshape(-1, n)
    place = lambda x: x / 65535 * data["span"] + data["low"]
    error = place(decode(data["cloud"]["positions"], "<u2", 3)) - shown.points
    assert np.abs(error).max() < 0.51 * data["span"] / 65535 + 1e-5 and data["span"] < 40
    colours = decode(data["cloud"]["colours"], "u1", 4)
    assert np.array_equal(colours[:, :3], shown.point_colors)
    assert data["cloud"]["starts"] == [t * 72 * 96 for t in range(9)]
    # a point is as large as a pixel's diagonal
    size = np.exp(np.interp(colours[:, 3], [0, 255], data["sizes"]))
    assert np.allclose(size, np.sqrt(2) * shown.depth.ravel() / (1.1 * 96), rtol=0.02)
    tracks = decode(data["tracks"]["positions"], "<u2", 4).reshape(8, -1, 4)
    order = [np.abs(place(t[:3]) - shown.tracks[:, 0]).sum(-1).argmin() for t in tracks[0]]
    assert sorted(order) == list(range(len(order))) != order
    assert np.abs(place(tracks[..., :3]) - shown.tracks[order].swapaxes(0, 1)).max() < 1e-3
    assert np.array_equal(tracks[..., 3] == 65535, shown.tracks_visible[order].T) and (tracks[..., 3] > 30000).all()
    poses = np.array([camera["pose"] for camera in data["cameras"]]).reshape(-1, 4, 4).swapaxes(1, 2)
    assert np.abs(poses - shown.world_from_camera).max() < 1e-6
    frame = cv2.imdecode(np.frombuffer(base64.b64decode(data["video"][3]), np.uint8), cv2.IMREAD_COLOR_RGB)
    assert frame.shape == (72, 96, 3) and np.abs(frame.astype(int) - shown.video[3]).mean() < 10


def test_the_page_asks_for_nothing_from_outside_and_escapes_what_it_is_told(shown, path):
    text = path.read_text("utf-8")
    assert not re.search(r"https?://|src=|@import|url\(|fetch\(", text.replace("image.src = ", ""))
    assert "A &lt;box&gt; &amp; more" in text and "0.1 &amp; &lt;b&gt;" in text and "<box>" not in text
    assert "{{" not in text


def test_many_points_are_thinned_evenly_and_the_page_stays_small(shown):
    text = page(shown, max_points=5000)
    data = data_of(text)
    assert f"5,000 of {len(shown.points):,} points" in html.unescape(text)
    counts = np.diff(data["cloud"]["starts"])
    assert counts.sum() == 5000 and (np.abs(counts - 625) <= 1).all()
    assert np.exp(data["sizes"][1]) == pytest.approx(np.sqrt(2 / 1.1**2 * 72 / 96 / 625) * shown.depth.max(), rel=0.02)
    big = replace(example(24, 96, 128), video=np.zeros((24, 512, 512, 3)))
    assert len(page(big, max_points=200_000)) < 4e6
    many = {name: getattr(shown, name).repeat(600, 0) for name in NO_TRACKS}
    text = page(replace(shown, **many))
    assert data_of(text)["tracks"]["count"] == 250_000 // 8 and f" of {len(many['tracks']):,} tracks" in text
    assert len(text) < 6e6


def test_points_that_cannot_be_shown_are_counted(shown):
    points = shown.points.copy()
    points[:5], points[5:7], points[7:10] = np.nan, np.inf, 1e6
    text = page(replace(shown, points=points))
    assert "7 left out: not finite, 3 left out: too far away" in text
    assert data_of(text)["span"] < 40 and data_of(text)["cloud"]["starts"][1] == 72 * 96 - 10


@pytest.mark.parametrize("options", [{"fps": 0}, {"fps": float("nan")}, {"max_points": -1}, {"picture_width": 0}])
def test_options_out_of_range(shown, options):
    with pytest.raises(ValueError, match=f"wanted fps > 0.*got.*{next(iter(options.values()))}"):
        page(shown, **options)


def test_a_page_that_cannot_be_written(shown, tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(OSError, match="file"):
        write_page(tmp_path / "file" / "page.html", shown)
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


# ---- what a browser makes of it ------------------------------------------------------------------------------------


def test_pictures_change_with_the_frame(path, shown, picture):
    first, later = picture(path, "frame=0"), picture(path, "frame=5")
    assert filled(first) > 0.15 and np.unique(scene(first).reshape(-1, 3), axis=0).shape[0] > 500
    assert (np.abs(scene(first) - scene(later)).max(-1) > 24).mean() > 0.05
    # the corner shows the video, with some tracks on it, and its depth
    wanted = cv2.resize(shown.video[5], (226, 170), interpolation=cv2.INTER_AREA).astype(int)
    corner = np.abs(later[23:193, 751:977] - wanted).max(-1)[:140]
    assert np.median(corner) < 25 < np.median(np.abs(first[23:193, 751:977] - wanted).max(-1)[:140])
    depth = later[199:369, 751:977]
    assert depth[10, 60, 0] > 150 > depth[10, 60, 2], "far is red"
    assert depth[90, 110, 0] < 100 and depth[90, 110, 2] > depth[90, 110, 0] + 10, "near is blue"


@pytest.mark.parametrize("flags", [WEBGL, PLAIN], ids=["WebGL", "Plain"])
def test_the_view_is_right_and_each_layer_can_be_hidden(path, shown, scenes, flags):
    others = "tracks=0&cameras=0&cloud"
    through = [f"frame={t}&tracks=0&follow=1" for t in (1, 6)]
    layers = [f"{others}=none", "tracks=0&cloud=none", f"{others}=frame", f"{others}=all"]
    paths = [f"cloud=none&cameras=0&trail={n}" for n in (0, 8)]
    fragments = [*through, *("follow=0&frame=4&tracks=99&cameras=1&" + part for part in layers + paths)]
    first, last, nothing, cameras, one, every, discs, trails = scenes(path, fragments, *flags)

    # through the camera, the points make up the video; the frame fills 96 % of the height, and its pixels are square
    size = round(0.96 * HEIGHT * 96 / 72), round(0.96 * HEIGHT)
    left, top = (WIDTH - size[0]) // 2, (HEIGHT - size[1]) // 2
    for t, image in ((1, first), (6, last)):
        wanted = cv2.resize(shown.video[t], size, interpolation=cv2.INTER_NEAREST).astype(int)
        got = image[top : top + size[1], left : left + size[0]]
        assert np.abs(got - wanted).mean() < 14 and np.abs(got - wanted[:, ::-1]).mean() > 30

    orange = lambda image: (np.abs(image - (255, 184, 84)).max(-1) < 30).sum()
    assert filled(nothing) == 0 == orange(nothing) and orange(cameras) > 200
    assert 0.1 < filled(one) < filled(every)
    assert 0.002 < filled(discs) < filled(trails) < 0.5


@pytest.mark.parametrize(
    ("case", "flags"),
    [("nothing", WEBGL), ("one frame", WEBGL), ("not finite", WEBGL), ("nothing", PLAIN)],
    ids=lambda x: x if isinstance(x, str) else "WebGL" if x is WEBGL else "Plain",
)
def test_edges(tmp_path, look, case, flags):
    small = example(2, 24, 32)
    nans = {name: np.full_like(getattr(small, name), np.nan) for name in ("points", "tracks", "tracks_uv", "depth")}
    made = {
        "nothing": replace(without(small, EMPTY, NO_TRACKS), depth=nans["depth"]),
        "one frame": example(1, 24, 32),
        "not finite": replace(small, **nans, tracks_visible=np.zeros_like(small.tracks_visible)),
    }[case]
    write_page(tmp_path / "p.html", made)
    found = look(tmp_path / "p.html", "", *flags)
    assert (found["state"], found["messages"], found.get("error")) == ("ready", [], None)
    last = "1 / 1" if case == "one frame" else "/ 2"
    assert last in found["text"]


def test_an_error_in_the_script_does_not_pass_unseen(path, tmp_path, look):
    broken = tmp_path / "broken.html"
    broken.write_text(path.read_text("utf-8").replace("show({ tracks:", "shew({ tracks:"), "utf-8")
    found = look(broken)
    assert "shew is not defined" in found["error"] and any("shew" in line for line in found["messages"])
    assert "state" not in found


ACTIONS = """
<script>
const note = {};
const key = name => canvas.dispatchEvent(new KeyboardEvent("keydown", { key: name, cancelable: true, bubbles: true }));
const pointer = (type, id, x, y, buttons) => canvas.dispatchEvent(
  new PointerEvent(type, { pointerId: id, clientX: x, clientY: y, buttons, bubbles: true }));
canvas.setPointerCapture = () => {};  // there is no real pointer to capture
const drag = (id, buttons, ...places) => {
  pointer("pointerdown", id, ...places[0], buttons);
  places.slice(1).forEach(place => pointer("pointermove", id, ...place, buttons));
  pointer("pointerup", id, ...places[places.length - 1], 0);
};
key("ArrowRight"); key("ArrowRight"); note.right = state.frame;
key("Home"); key("ArrowLeft"); note.left = state.frame;
key(" "); note.playing = state.playing; key(" "); note.paused = !state.playing;
const [yaw, pitch, distance, target] = [orbit.yaw, orbit.pitch, orbit.distance, [...orbit.target]];
drag(1, 1, [600, 400], [650, 430]); note.turned = [orbit.yaw - yaw, orbit.pitch - pitch];
drag(1, 2, [600, 400], [700, 400]); note.moved = Math.hypot(...add(orbit.target, target, -1));
canvas.dispatchEvent(new WheelEvent("wheel", { deltaY: -300, cancelable: true }));
note.zoomed = orbit.distance / distance;
const wide = orbit.distance;
pointer("pointerdown", 1, 500, 400, 1); pointer("pointerdown", 2, 600, 400, 1); pointer("pointermove", 2, 700, 400, 1);
note.pinched = orbit.distance / wide;
pointer("pointerup", 1, 500, 400, 0); pointer("pointerup", 2, 700, 400, 0);
key("c"); note.follow = state.follow;
$("cloud").children[2].click(); $("cameras").click();
note.layers = [state.cloud, state.cameras];
key("r"); note.reset = [orbit.yaw - yaw, orbit.distance - distance, state.follow];
document.documentElement.dataset.note = JSON.stringify(note);
</script>
</body>"""


def test_keys_mouse_and_touch(path, tmp_path, look):
    acted = tmp_path / "acted.html"
    acted.write_text(path.read_text("utf-8").replace("</body>", ACTIONS), "utf-8")
    found = look(acted, "frame=0")
    assert not found["messages"]
    note = json.loads(html.unescape(found["note"]))
    assert (note["right"], note["left"], note["playing"], note["paused"], note["follow"]) == (2, 7, True, True, True)
    assert note["turned"] == pytest.approx([-0.3, 0.18]) and note["moved"] > 0.1
    assert note["zoomed"] == pytest.approx(np.exp(-0.36)) and note["pinched"] == pytest.approx(0.5)
    assert note["layers"] == ["all", False] and note["reset"] == [0, 0, False]


def test_it_plays_when_nothing_else_is_asked(path, look):
    assert "M3 2h4v12" in look(path)["text"], "the button shows a pause sign"
    still = look(path, "frame=6")
    assert "M4 1.5l10" in still.pop("text"), "the button shows a play sign"
    assert still == {"state": "ready", "renderer": "WebGL", "frame": "6", "messages": []}
