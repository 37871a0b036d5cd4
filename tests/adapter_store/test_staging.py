"""Uploads: what is well-formed gets one digest however it is packed; everything else is refused with every fault named."""

from __future__ import annotations

import contextlib
import io
import json
import pickle
import stat
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import save

from adapter_store.errors import AdapterRejected, UploadTooLarge
from adapter_store.staging import Staging
from tests.adapter_store.uploads import CONFIG, good, header, stage, weights


def zipped(files: dict[str, bytes], compression: int = zipfile.ZIP_DEFLATED) -> bytes:
    target = io.BytesIO()
    with zipfile.ZipFile(target, "w", compression) as archive:
        for name, content in files.items():
            archive.writestr(name, content)
    return target.getvalue()


def tarred(files: dict[str, bytes], mode: str = "w") -> bytes:
    target = io.BytesIO()
    with tarfile.open(fileobj=target, mode=mode) as archive:  # type: ignore[call-overload]
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return target.getvalue()


def test_packaging_does_not_change_the_digest(tmp_path: Path) -> None:
    files = good()
    folder = {f"run-7/{name}": content for name, content in files.items()}
    packings = [
        files,
        {"x.zip": zipped(files)},
        {"x.zip": zipped(folder)},
        {"x.tar": tarred(files)},
        {"x.tar.gz": tarred(folder, "w:gz")},
        {"x.tgz": tarred({**folder, "run-7/optimizer.pt": b"\x80\x04pickle"}, "w:gz")},
        {**files, "README.md": b"# hi", "tokenizer.json": b"{}"},
    ]
    assert len({stage(tmp_path, packing)[1].digest for packing in packings}) == 1


def test_other_files_of_a_training_directory_are_skipped_and_listed(tmp_path: Path) -> None:
    _, staged = stage(tmp_path, {**good(), "optimizer.pt": b"\x80\x04.", "chat_template.jinja": b"{{ x }}"})
    assert staged.skipped == ("optimizer.pt", "chat_template.jinja")
    assert staged.config == CONFIG


def test_nothing_is_left_after_discarding(tmp_path: Path) -> None:
    staging, _ = stage(tmp_path, good())
    staging.discard()
    assert list(tmp_path.iterdir()) == []


def test_the_byte_cap_stops_an_upload_while_it_arrives(tmp_path: Path) -> None:
    with Staging(tmp_path, 100) as staging, pytest.raises(UploadTooLarge):
        staging.open("optimizer.pt").write(b"x" * 101)


def link(name: str) -> bytes:
    target = io.BytesIO()
    with tarfile.open(fileobj=target, mode="w") as archive:
        member = tarfile.TarInfo(name)
        member.type, member.linkname = tarfile.SYMTYPE, "/etc/passwd"
        archive.addfile(member)
    return target.getvalue()


def zip_link() -> bytes:
    target = io.BytesIO()
    with zipfile.ZipFile(target, "w") as archive:
        info = zipfile.ZipInfo("adapter_config.json")
        info.external_attr = (stat.S_IFLNK | 0o777) << 16
        archive.writestr(info, "/etc/passwd")
    return target.getvalue()


def lying_zip() -> bytes:
    content = bytearray(zipped({"adapter_config.json": json.dumps(CONFIG).encode()}, zipfile.ZIP_STORED))
    place = content.rfind(b"PK\x01\x02") + 24
    content[place : place + 4] = (5).to_bytes(4, "little")
    return bytes(content)


def device(kind: bytes) -> bytes:
    target = io.BytesIO()
    with tarfile.open(fileobj=target, mode="w") as archive:
        member = tarfile.TarInfo("adapter_config.json")
        member.type = kind
        archive.addfile(member)
    return target.getvalue()


def duplicated() -> bytes:
    target = io.BytesIO()
    with tarfile.open(fileobj=target, mode="w") as archive:
        for content in (b"{}", b"{ }"):
            member = tarfile.TarInfo("adapter_config.json")
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return target.getvalue()


ARCHIVES: dict[str, Callable[[], bytes]] = {
    "traversal": lambda: zipped({"../adapter_config.json": b"{}"}),
    "deep traversal": lambda: zipped({"a/../../adapter_config.json": b"{}"}),
    "absolute": lambda: tarred({"/etc/adapter_config.json": b"{}"}),
    "backslash": lambda: zipped({"..\\adapter_config.json": b"{}"}),
    "drive": lambda: zipped({"C:/adapter_config.json": b"{}"}),
    "tar link": lambda: link("adapter_config.json"),
    "zip link": zip_link,
    "hard link": lambda: device(tarfile.LNKTYPE),
    "fifo": lambda: device(tarfile.FIFOTYPE),
    "block device": lambda: device(tarfile.BLKTYPE),
    "character device": lambda: device(tarfile.CHRTYPE),
    "lying size": lying_zip,
    "duplicate": duplicated,
    "two folders": lambda: zipped({"a/adapter_config.json": b"{}", "b/adapter_model.safetensors": weights()}),
    "too deep": lambda: zipped({f"a/b/{name}": content for name, content in good().items()}),
    "nested": lambda: zipped({"adapter_config.json": zipped({"x": b""})}),
    "bomb": lambda: zipped({"adapter_config.json": b"{}", "adapter_model.safetensors": b"\0" * (30 << 20)}),
    "tar bomb": lambda: tarred({"adapter_config.json": b"{}", "adapter_model.safetensors": b"\0" * (30 << 20)}, "w:gz"),
    "members": lambda: zipped({f"file-{index}": b"" for index in range(40)}),
    "truncated zip": lambda: zipped(good())[:-30],
    "truncated tar": lambda: tarred(good(), "w:gz")[:-30],
    "not an archive": lambda: b"hello",
    "empty": lambda: b"",
    "empty zip": lambda: zipped({}),
}


@pytest.mark.parametrize("name", ARCHIVES)
def test_hostile_archives_are_refused_and_touch_nothing(name: str, tmp_path: Path) -> None:
    outside = sorted(tmp_path.parent.iterdir())
    with pytest.raises(AdapterRejected) as caught:
        stage(tmp_path / "uploads", {"upload.zip": ARCHIVES[name]()}, max_bytes=64 << 20, chunk=1 << 20)
    assert caught.value.faults[0].message
    written = {path.name for path in (tmp_path / "uploads").rglob("*") if path.is_file()}
    assert written <= {"archive", "config", "weights"}
    assert sorted(tmp_path.parent.iterdir()) == outside


def canary_pickle(canary: Path) -> bytes:
    class Bomb:
        def __reduce__(self) -> tuple[object, ...]:
            return Path.touch, (canary,)

    return pickle.dumps(Bomb())


WEIGHTS: dict[str, Callable[[], bytes]] = {
    "empty": lambda: b"",
    "short": lambda: b"\x01\x02",
    "truncated": lambda: weights()[:-4],
    "padded": lambda: weights() + b"\0\0\0\0",
    "huge header length": lambda: (1 << 40).to_bytes(8, "little") + b"{}",
    "not json": lambda: header(b"nonsense"),
    "not utf-8": lambda: header(b"\xff\xfe"),
    "list": lambda: header([]),
    "deep": lambda: header(b"[" * 100_000),
    "duplicate key": lambda: header(
        b'{"a": {"dtype":"F32","shape":[0],"data_offsets":[0,0]}, "a": {"dtype":"F32","shape":[0],"data_offsets":[0,0]}}'
    ),
    "unknown dtype": lambda: header({"a": {"dtype": "F8", "shape": [1], "data_offsets": [0, 1]}}, b"\0"),
    "offsets beyond file": lambda: header({"a": {"dtype": "F32", "shape": [4], "data_offsets": [0, 16]}}, b"\0" * 8),
    "negative offset": lambda: header({"a": {"dtype": "F32", "shape": [1], "data_offsets": [-4, 0]}}, b""),
    "overlap": lambda: header(
        {
            "a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]},
            "b": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]},
        },
        b"\0" * 4,
    ),
    "gap": lambda: header({"a": {"dtype": "F32", "shape": [1], "data_offsets": [4, 8]}}, b"\0" * 8),
    "shape overflow": lambda: header({"a": {"dtype": "F32", "shape": [1 << 40, 1 << 40], "data_offsets": [0, 4]}}, b"\0" * 4),
    "float shape": lambda: header({"a": {"dtype": "F32", "shape": [1.0], "data_offsets": [0, 4]}}, b"\0" * 4),
    "extra field": lambda: header({"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4], "x": 1}}, b"\0" * 4),
    "no tensors": lambda: header({"__metadata__": {"format": "pt"}}),
    "nan": lambda: save({"a": np.array([1.0, np.nan], dtype="f4")}),
    "infinity": lambda: save({"a": np.array([np.inf], dtype="f2")}),
    "zip in disguise": lambda: zipped({"archive/data.pkl": b"x"}),
}


@pytest.mark.parametrize("name", WEIGHTS)
def test_bad_weights_are_refused(name: str, tmp_path: Path) -> None:
    with pytest.raises(AdapterRejected) as caught:
        stage(tmp_path, {**good(), "adapter_model.safetensors": WEIGHTS[name]()})
    assert all(fault.code in ("corrupt_safetensors", "no_tensors", "non_finite_tensor") for fault in caught.value.faults)


@pytest.mark.parametrize(
    "name", ["adapter_model.safetensors", "adapter_config.json", "adapter_model.bin", "optimizer.pt", "x.zip"]
)
def test_pickles_are_never_opened(name: str, tmp_path: Path) -> None:
    canary = tmp_path / "canary"
    files = {**good(), name: canary_pickle(canary)}
    if name == "adapter_model.bin":
        del files["adapter_model.safetensors"]
    if name != "optimizer.pt":
        with pytest.raises(AdapterRejected) as caught:
            stage(tmp_path / "uploads", files)
        if name == "adapter_model.bin":
            assert "medley convert" in caught.value.faults[0].message
    else:
        stage(tmp_path / "uploads", files)
    assert not canary.exists()


@pytest.mark.parametrize(
    "text",
    [
        "", "null", "[]", "{", '{"a": NaN}', '{"a": Infinity}', '{"a": 1, "a": 2}', "[" * 5000, '{"auto_map": {"AutoConfig": "x.py"}}',
        '{"trust_remote_code": true}', '"text"', '{"a": "' + "x" * 300_000 + '"}', '{"n": ' + "9" * 5000 + "}", "\ufeff{}",
    ],
)  # fmt: skip
def test_bad_configs_are_refused(text: str, tmp_path: Path) -> None:
    with pytest.raises(AdapterRejected) as caught:
        stage(tmp_path, {**good(), "adapter_config.json": text.encode("utf-8")})
    assert caught.value.faults[0].code == "invalid_config"


def test_all_faults_come_together(tmp_path: Path) -> None:
    with pytest.raises(AdapterRejected) as caught:
        stage(
            tmp_path,
            {
                "adapter_config.json": b"{",
                "adapter_model.safetensors": save({"a": np.array([np.nan], dtype="f4"), "b": np.array([np.inf], dtype="f4")}),
            },
        )
    assert [fault.code for fault in caught.value.faults] == ["invalid_config", "non_finite_tensor", "non_finite_tensor"]


@settings(max_examples=300)
@given(data=st.data())
def test_mutated_uploads_are_refused_or_whole(data: st.DataObject, tmp_path: Path) -> None:
    name = data.draw(st.sampled_from(sorted(good())))
    content = bytearray(good()[name])
    for _ in range(data.draw(st.integers(1, 4))):
        place = data.draw(st.integers(0, len(content) - 1))
        content[place] = data.draw(st.integers(0, 255))
    if data.draw(st.booleans()):
        del content[data.draw(st.integers(0, len(content) - 1)) :]
    with contextlib.suppress(AdapterRejected):
        staging, staged = stage(tmp_path, {**good(), name: bytes(content)})
        assert staged.digest.startswith("sha256:")
        staging.discard()


def _hub(**more: bytes) -> dict[str, bytes]:
    """An AdapterHub directory; keyword ``head_config_json`` is the file head_config.json."""
    names = {name: name.replace("_json", ".json").replace("_safetensors", ".safetensors") for name in more}
    files = {"adapter_config.json": b'{"config": {}, "name": "x"}', "adapter.safetensors": weights()}
    return files | {names[name]: content for name, content in more.items()}


def test_adapterhub_files_have_their_roles_however_they_are_packed(tmp_path: Path) -> None:
    files = _hub(head_config_json=b'{"config": null}', model_head_safetensors=weights(1), labels_json=b'["no", "yes"]')
    _, staged = stage(tmp_path, files)
    assert set(staged.paths) == {"config", "weights", "head_config", "head_weights", "labels"}
    assert stage(tmp_path, {"x.zip": zipped(files)})[1].digest == staged.digest
    assert stage(tmp_path, {**files, "labels.json": b'["no", "YES"]'})[1].digest != staged.digest


def test_a_fusion_names_its_children(tmp_path: Path) -> None:
    files = {"adapter_fusion_config.json": b'{"config": {}, "name": "a,b"}', "model_adapter_fusion.safetensors": weights()}
    assert stage(tmp_path, files)[1].children == ("a", "b")
    assert stage(tmp_path, _hub())[1].children == ()
    for name in (b'""', b"3", b'"a,a"', b'"' + b",".join(b"n%d" % index for index in range(99)) + b'"'):
        with pytest.raises(AdapterRejected) as caught:
            stage(tmp_path, {**files, "adapter_fusion_config.json": b'{"config": {}, "name": ' + name + b"}"})
        assert [fault.where for fault in caught.value.faults] == ["adapter_fusion_config.json: name"]


NAN = save({"a": np.array([np.nan], dtype="f4")})


@pytest.mark.parametrize(
    ("files", "code", "where"),
    [
        ({**_hub(), "adapter_model.safetensors": weights()}, "duplicate_file", "adapter_model.safetensors"),
        ({**_hub(), "adapter_fusion_config.json": b"{}"}, "duplicate_file", "adapter_fusion_config.json"),
        ({"x.zip": zipped({**_hub(), "adapter_model.safetensors": weights()})}, "duplicate_file", "adapter_model.safetensors"),
        (_hub(head_config_json=b"{}"), "missing_file", "model_head.safetensors"),
        (_hub(model_head_safetensors=weights()), "missing_file", "head_config.json"),
        (_hub(head_config_json=b"{", model_head_safetensors=weights()), "invalid_config", "head_config.json"),
        (_hub(head_config_json=b'{"a": NaN}', model_head_safetensors=weights()), "invalid_config", "head_config.json"),
        (_hub(head_config_json=b"[" * 99, model_head_safetensors=weights()), "invalid_config", "head_config.json"),
        (_hub(head_config_json=b"{}", model_head_safetensors=b"\x80\x04."), "corrupt_safetensors", "model_head.safetensors"),
        (_hub(head_config_json=b"{}", model_head_safetensors=NAN), "non_finite_tensor", "a"),
        (_hub(labels_json=b'{"0": "no"}'), "invalid_config", "labels.json"),
        (_hub(labels_json=b'["no", 1]'), "invalid_config", "labels.json"),
        (_hub(labels_json=b'["no", "no"]'), "invalid_config", "labels.json"),
        (_hub(labels_json=b'["' + b"x" * 300 + b'"]'), "invalid_config", "labels.json"),
    ],
)
def test_every_file_is_read_as_strictly_as_the_first(files: dict[str, bytes], code: str, where: str, tmp_path: Path) -> None:
    with pytest.raises(AdapterRejected) as caught:
        stage(tmp_path, files)
    assert [(fault.code, fault.where) for fault in caught.value.faults] == [(code, where)]
