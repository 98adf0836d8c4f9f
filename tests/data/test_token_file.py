"""Files of tokens: exact, compact, read at random, and refused where they are damaged."""

import struct
import zlib

import pytest
import torch

from fourdperf.data.token_file import BLOCK, MAGIC, PREAMBLE, Description, TokenFile, TokenFileError, TokenWriter


def described(count=5, **fields):
    values = {
        "model": "run",
        "fingerprint": "0123456789abcdef",
        "image_size": (16, 24),
        "num_tokens": 7,
        "count": count,
    }
    return Description(**{**values, **({"codebook_size": 100} if "channels" not in fields else {}), **fields})


def write(path, tokens, description, batch=3):
    with TokenWriter(path, description) as writer:
        for part in tokens.split(batch):
            writer.append(part)
    return TokenFile(path)


def codes(count, size=100, places=7):
    return torch.randint(size, (count, places), generator=torch.Generator().manual_seed(count))


@pytest.mark.parametrize("size, bits", [(1, 1), (2, 1), (3, 2), (100, 7), (1024, 10), (4096, 12), (2**20 + 1, 21)])
def test_codes_come_back_in_as_many_bits_as_they_need(tmp_path, size, bits):
    tokens = codes(5, size)
    tokens[0, 0], tokens[-1, -1] = 0, size - 1
    file = write(tmp_path / "a.tok", tokens, described(codebook_size=size))
    assert torch.equal(file.read(0, 5), tokens) and file.read(0, 5).dtype == torch.int64
    assert file.description == described(codebook_size=size)
    assert file.description.record_bytes == -(-7 * bits // 8)
    assert (tmp_path / "a.tok").stat().st_size == file.start + 5 * file.description.record_bytes + 4


def test_latents_come_back_in_halves(tmp_path):
    latents = torch.randn(5, 7, 3)
    file = write(tmp_path / "a.tok", latents, described(channels=3))
    assert torch.equal(file.read(0, 5), latents.half().float()) and file.description.record_bytes == 42
    with pytest.raises(ValueError, match="wanted latents that fp16 can hold"):
        write(tmp_path / "b.tok", latents * 1e6, described(channels=3))


@pytest.mark.parametrize("count", [0, 1, BLOCK - 1, BLOCK, BLOCK + 1, 2 * BLOCK + 5])
def test_any_picture_is_read_alone(tmp_path, count):
    tokens = codes(count)
    file = write(tmp_path / "a.tok", tokens, described(count), batch=100)
    assert len(file) == count and torch.equal(file.read(0, count), tokens)
    for index in {0, 1, BLOCK - 1, BLOCK, count - 1, -1} & set(range(-count, count)):
        assert torch.equal(TokenFile(file.path)[index][0], tokens[index])
    for start, stop in ((0, 0), (count - 1, count + 9), (BLOCK - 2, BLOCK + 2), (count, count)):
        start = max(0, start)
        assert torch.equal(TokenFile(file.path).read(start, stop), tokens[start:stop])
    with pytest.raises(IndexError, match=f"got {count}"):
        file[count]


def test_names_and_labels_are_kept(tmp_path):
    more = {"names": ("a/b.png", "é.jpg", "c"), "labels": (2, 0, 1), "classes": ("x", "y", "z")}
    file = write(tmp_path / "a.tok", codes(3), described(3, **more))
    assert file.description.names == more["names"] and [file[i][1] for i in range(3)] == [2, 0, 1]
    assert file.description.classes == ("x", "y", "z")
    with pytest.raises(ValueError, match="labels: wanted 3, one a picture, got 2"):
        described(3, labels=(0, 1))


def test_a_block_that_ends_early_leaves_no_file_and_what_was_there(tmp_path):
    path = tmp_path / "a.tok"
    write(path, codes(5), described())
    before = path.read_bytes()
    with pytest.raises(ValueError, match="wanted 5 pictures, got 4"):
        write(path, codes(4), described())
    with pytest.raises(ValueError, match="wanted 5 pictures, got 6"):
        write(path, codes(6), described())
    with pytest.raises(KeyboardInterrupt), TokenWriter(path, described()) as writer:
        writer.append(codes(2))
        raise KeyboardInterrupt
    assert path.read_bytes() == before and list(tmp_path.iterdir()) == [path]


def test_tokens_that_do_not_fit_are_refused(tmp_path):
    for tokens, message in (
        (codes(2, places=6), r"wanted codes \(B, 7\), got \(2, 6\)"),
        (torch.rand(2, 7), r"wanted codes \(B, 7\)"),
        (codes(2) + 100, "wanted codes 0 .. 99, got 1"),
        (codes(2) - 100, "wanted codes 0 .. 99, got -"),
    ):
        with pytest.raises(ValueError, match=message):
            write(tmp_path / "a.tok", tokens, described(2))
    with pytest.raises(ValueError, match="codebook_size, channels: wanted one"):
        described(2, channels=3, codebook_size=4)


# Damage


@pytest.fixture
def content(tmp_path):
    write(tmp_path / "a.tok", codes(BLOCK + 9), described(BLOCK + 9, names=None))
    return (tmp_path / "a.tok").read_bytes()


def opened(tmp_path, content):
    (tmp_path / "b.tok").write_bytes(content)
    file = TokenFile(tmp_path / "b.tok")
    return file.read(0, len(file))


def test_every_length_but_its_own_is_refused(tmp_path, content):
    for length in [*range(0, 120, 3), len(content) - 5, len(content) - 1]:
        with pytest.raises(TokenFileError, match="b.tok: (cut off|wanted a file of tokens)"):
            opened(tmp_path, content[:length])
    with pytest.raises(TokenFileError, match="b.tok: too long"):
        opened(tmp_path, content + b"\0")


def test_every_flipped_bit_is_found(tmp_path, content):
    for place in [*range(0, 400, 7), *range(400, len(content), 97), len(content) - 1]:
        damaged = bytearray(content)
        damaged[place] ^= 16
        with pytest.raises(TokenFileError, match="b.tok: "):
            opened(tmp_path, bytes(damaged))


def test_damage_is_told_where_it_is_read_and_nowhere_else(tmp_path, content):
    damaged = bytearray(content)
    damaged[-9] ^= 1  # the last record
    (tmp_path / "b.tok").write_bytes(damaged)
    file = TokenFile(tmp_path / "b.tok")
    assert torch.equal(file[3][0], codes(BLOCK + 9)[3])
    with pytest.raises(TokenFileError, match=f"corrupt: pictures {BLOCK} to {BLOCK + 8} fail their CRC"):
        file[BLOCK]


def test_foreign_files_and_versions_are_refused(tmp_path, content):
    with pytest.raises(TokenFileError, match=r"wanted a file of tokens, got one that begins b'\\x89PNG"):
        opened(tmp_path, b"\x89PNG\r\n\x1a\n" + content)
    with pytest.raises(TokenFileError, match="wanted version 1 of the format, got 2"):
        opened(tmp_path, MAGIC + struct.pack("<I", 2) + content[12:])
    for text in (b"[]", b"{}", b"no json", b'{"model": 3, "unknown": 4}'):
        header = zlib.compress(text)
        start = PREAMBLE.pack(MAGIC, 1, len(header), zlib.crc32(header))
        with pytest.raises(TokenFileError, match="corrupt: no description"):
            opened(tmp_path, start + header)
    with pytest.raises(FileNotFoundError, match="none.tok"):
        TokenFile(tmp_path / "none.tok")


def test_another_tokenizer_is_refused_and_both_are_named(tmp_path):
    file = write(tmp_path / "a.tok", codes(5), described())
    file.check_made_by("a copy of it", "0123456789abcdef")
    with pytest.raises(TokenFileError, match="tokens of run .*0123456789abcdef.* nothing to other .*fedcba"):
        file.check_made_by("other", "fedcba9876543210")
