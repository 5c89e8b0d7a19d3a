#!/usr/bin/env python3
"""The text that the demonstration model learns from: the Python source of this interpreter's standard library.

    python scripts/demo_data.py             write the list of files, the held-out text and the tokenizer
    python scripts/demo_data.py --calibration   write the calibration text alone
    python scripts/demo_data.py --check     say whether this interpreter's files are those of the list

The list (models/data/files.tsv) names every file with its SHA-256, its split and its subject area; the split follows
from a hash of the path. The held-out text itself is in models/data/heldout.jsonl, so that an evaluation needs no
particular interpreter, and so is a sample of the training text, by which `cmjax quantize` calibrates
(models/data/calibration.jsonl); training needs the one whose files are on the list (CPython 3.12.1, with its tests).
"""

import argparse
import dataclasses
import fnmatch
import functools
import hashlib
import json
import sys
import sysconfig
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from cmjax.errors import UserError

if TYPE_CHECKING:
    import tokenizers

ROOT = Path(__file__).resolve().parents[1]
DATA = ROOT / "models" / "data"
LIST = DATA / "files.tsv"
HELDOUT = DATA / "heldout.jsonl"
CALIBRATION = DATA / "calibration.jsonl"
MODEL = ROOT / "models" / "demo"
HELDOUT_PERCENT = 8
# Some of the largest files are a third of their area: this salt of the hash is one of few that hold at least a
# twentieth of every area out, and less than 3 MB in all.
SPLIT_SALT = "2938"
# Of each area: so many pieces of so many characters.
CALIBRATION_PIECES, CALIBRATION_CHARACTERS = 12, 2048
VOCAB_SIZE = 2048
BOS, EOS, USER, ASSISTANT = "<|begin|>", "<|end|>", "<|user|>", "<|assistant|>"

# The first pattern that matches a path decides; a test belongs to the subject that it tests, and `test_` is dropped
# from the names before they are matched.
AREAS = {
    "asyncio": "asyncio/* asyncgen coroutines contextlib_async async*",
    "concurrency": "multiprocessing/* concurrent/* *threading* *thread* queue sched *multiprocessing* dummy* context* "
    "mp_* lock_tests fork* wait[34] interpreters contextvars thread* *subinterpreters *interpchannels",
    "email": "email/* mailbox mailcap smtp* imap* pop* nntp* mime* quopri binascii base64 uu",
    "networking": "http/* urllib/* xmlrpc/* wsgiref/* *socket* ssl* ftplib telnetlib url* http* *xmlrpc* cgi* select* "
    "poll epoll kqueue devpoll ipaddress netrc robotparser webbrowser nturl2path timeout uuid",
    "markup": "xml/* html/* *xml* html* minidom sax pulldom pyexpat plistlib _markupbase xdrlib",
    "interface": "tkinter/* tkinter idlelib/* turtle* turtledemo/* curses/* *curses* ttk* tcl tix idle readline "
    "rlcompleter cmd *pty tty termios getpass colorsys audio* wave aifc sunau chunk *hdr ossaudiodev winsound",
    "storage": "json/* tomllib/* dbm/* sqlite3/* csv configparser pickle* *pickle* copyreg marshal shelve dbm* "
    "zipfile/* zip* tarfile gzip bz2 lzma zlib *compression* largefile",
    "files": "os* pathlib *path shutil tempfile glob fnmatch filecmp fileinput *io stat* file* posix* mmap "
    "bufio pwd grp fcntl ioctl univnewlines linecache",
    "text": "encodings/* re/* *re string* textwrap difflib *codec* unicode* ucn format* fstring* locale gettext shlex "
    "sre_* *cjk* *encoding* utf8* pprint reprlib print bytes tokenizedata/* re_tests levenshtein* c_locale* getopt "
    "argparse optparse",
    "numbers": "*decimal* fractions *math* random statistics numbers float* long* int* complex bool pow numeric_tower "
    "*numbers* struct* strtod hash* secrets hmac binop _pylong ieee* unary bigmem bigaddr* *hashlib augassign",
    "time": "*datetime* zoneinfo/* calendar *time* time* strftime",
    "collections": "collections/* collections _collections_abc *dict* list* set* tuple range slice heapq bisect array "
    "deque *iter* *itertools enumerate functools operator *seq* mapping* sort* *weak* copy graphlib user* memoryview "
    "*buffer contains richcmp compare zip defaultdict ordered* generator*  genexps sortperf",
    "modules": "importlib/* import/* import* pkg* *runpy* zipimport* site* sysconfig* venv/* ensurepip/* *venv* "
    "module* compileall py_compile frozen* distutils* __*__ relimport getpath package*",
    "language": "lib2to3/* peg_generator/* *ast* *token* symtable dis* inspect/* inspect typing* *type* dataclasses/* "
    "dataclasses enum abc _py_abc descr* syntax grammar *compile* code* *opcode* *scope* exception* class* metaclass "
    "super property *func* *annot* keyword* except* pyclbr* *syntax* patma unpack* decorat* named_expr* raise "
    "*unparse* with positional* genericalias *generic* call* extcall peepholer contextlib global eof "
    "builtin baseexception dynamic* isinstance index yield_from flufl *decorator* *import* dis_module",
    "tools": "pydoc* logging/* logging pdb bdb *trace* *profil* pstats timeit warnings* *warnings* gc sys* ctypes/* "
    "ctypes subprocess signal* faulthandler platform resource cmd_line* repl audit* capi/* embed* *gdb/* "
    "monitoring perf* finalization atexit clinic asdl* tools/* c*analyzer* tabnanny modulefinder launcher crashers "
    "subprocess* interpreters types ctypes* pydoc_data/*",
    "tests": "*",
}


@dataclasses.dataclass(frozen=True)
class Source:
    """One file: its path below the standard library, contents, split and area."""

    path: str
    text: str
    sha256: str

    @property
    def split(self) -> str:
        """`train` or `heldout`, by a hash of the path."""
        is_heldout = int(hashlib.sha256(f"{SPLIT_SALT}:{self.path}".encode()).hexdigest(), 16) % 100 < HELDOUT_PERCENT
        return "heldout" if is_heldout else "train"

    @property
    def area(self) -> str:
        """The subject."""
        path = self.path.removesuffix(".py").removeprefix("test/").replace("test_", "")
        parts = path.split("/")
        for area, patterns in AREAS.items():
            for pattern in patterns.split():
                folder = pattern.endswith("/*")
                if fnmatch.fnmatch(parts[0] + "/*" if folder and len(parts) > 1 else path, pattern):
                    return area
        raise AssertionError("the last pattern matches everything")


def stdlib() -> Path:
    """Where this interpreter keeps its standard library."""
    return Path(sysconfig.get_paths()["stdlib"])


def sources(folder: Path) -> Iterator[Source]:
    """Python files of the standard library in order of path, each content once.

    Without site-packages, empty files, files that are not UTF-8, and those that the build of an interpreter writes.
    """
    seen: set[str] = set()
    for path in sorted(folder.rglob("*.py")):
        name = path.relative_to(folder).as_posix()
        if name.startswith(("site-packages/", "config-", "_sysconfigdata")) or "__pycache__" in name:
            continue
        raw = path.read_bytes()
        sha256 = hashlib.sha256(raw).hexdigest()
        if not raw.strip() or sha256 in seen:
            continue
        try:
            text = raw.decode("utf-8")
        except UnicodeDecodeError:
            continue
        seen.add(sha256)
        yield Source(name, text, sha256)


def read_training_texts(list_path: Path, folder: Path) -> list[str]:
    """The training files of a list, in its order; a UserError names the first that `folder` has not, or not as listed.

    Args:
        list_path: `LIST`, or another in its format.
        folder: where the files are, `stdlib()` for those of `LIST`.
    """
    texts = []
    for line in list_path.read_text().splitlines()[1:]:
        name, sha256, split, _ = line.split("\t")
        if split != "train":
            continue
        raw = (folder / name).read_bytes() if (folder / name).is_file() else None
        if raw is None or hashlib.sha256(raw).hexdigest() != sha256:
            what = "is missing" if raw is None else "differs from the list's"
            raise UserError(f"{folder / name} {what}; {LIST.name} was made with CPython 3.12.1, its tests included")
        texts.append(raw.decode())
    return texts


class TokenStream:
    """Texts as sequences of tokens in random order, epoch after epoch.

    Attributes:
        num_tokens: of one epoch.
        bytes_per_token: the mean, not counting the tokens that begin and end a text.
    """

    def __init__(self, texts: list[str], tokenizer: "tokenizers.Tokenizer", seed: int) -> None:
        bos, eos = (tokenizer.token_to_id(token) for token in (BOS, EOS))
        # One by one: the library's record of a token takes a hundred bytes.
        ids = (tokenizer.encode(text, add_special_tokens=False).ids for text in texts)
        self.files = [np.array([bos, *file_ids, eos], np.int32) for file_ids in ids]
        self.num_tokens = sum(map(len, self.files))
        self.bytes_per_token = sum(len(text.encode()) for text in texts) / (self.num_tokens - 2 * len(texts))
        self.seed = seed
        self._epoch_rows = functools.lru_cache(maxsize=2)(self._cut_epoch)

    def _cut_epoch(self, phase: int, length: int, epoch: int) -> np.ndarray:
        """`int32[sequences, length]`: the files in one random order, end to end, the pieces in another."""
        rng = np.random.default_rng((self.seed, phase, epoch))
        stream = np.concatenate([self.files[i] for i in rng.permutation(len(self.files))])
        # What does not fill a sequence is left out, a different piece in every epoch.
        rows = stream[len(stream) % length :].reshape(-1, length)
        return rows[rng.permutation(len(rows))]

    def batch(self, phase: int, length: int, indices: range) -> np.ndarray:
        """`int32[len(indices), length]`: sequences of a phase by number, counted through its epochs."""
        per_epoch = self.num_tokens // length
        return np.stack([self._epoch_rows(phase, length, i // per_epoch)[i % per_epoch] for i in indices])


def train_tokenizer(texts: list[str]) -> None:
    """Train the byte-level BPE and write `tokenizer.json` and `tokenizer_config.json`."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    # Names with the one character before them, numbers in threes, line breaks with the indentation after them.
    words = r"[^\r\n\p{L}\p{N}_]?[\p{L}_]+|\p{N}{1,3}|(?:\r?\n)+[ \t]*| ?[^\s\p{L}\p{N}_]+|\s+"
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(words), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    special = [BOS, EOS, USER, ASSISTANT]
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    MODEL.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(MODEL / "tokenizer.json"))
    template = (
        "{{ bos_token }}{% for message in messages %}{{ '<|' + message['role'] + '|>' + message['content'] }}"
        "{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
    )
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": BOS,
        "eos_token": EOS,
        "additional_special_tokens": [USER, ASSISTANT],
        "add_bos_token": True,
        "clean_up_tokenization_spaces": False,
        "model_max_length": 2048,
        "chat_template": template,
    }
    (MODEL / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n")


def write_calibration(files: list[Source]) -> None:
    """Write pieces of training files, as many of each area, from the beginning of a line each."""
    rng = np.random.default_rng(0)
    with CALIBRATION.open("w") as out:
        for area in AREAS:
            texts = [f for f in files if f.split == "train" and f.area == area]
            long = [f for f in texts if len(f.text) >= 2 * CALIBRATION_CHARACTERS]
            for index in rng.choice(len(long), CALIBRATION_PIECES, replace=len(long) < CALIBRATION_PIECES):
                file = long[index]
                begin = int(rng.integers(len(file.text) - CALIBRATION_CHARACTERS))
                begin = file.text.rfind("\n", 0, begin + 1) + 1
                text = file.text[begin : begin + CALIBRATION_CHARACTERS]
                out.write(json.dumps({"path": file.path, "area": area, "text": text}) + "\n")


def write(files: list[Source]) -> None:
    """Write list, held-out text and tokenizer."""
    DATA.mkdir(parents=True, exist_ok=True)
    rows = ["path\tsha256\tsplit\tarea"] + [f"{f.path}\t{f.sha256}\t{f.split}\t{f.area}" for f in files]
    LIST.write_text("\n".join(rows) + "\n")
    heldout = [f for f in files if f.split == "heldout"]
    with HELDOUT.open("w") as out:
        for f in heldout:
            out.write(json.dumps({"path": f.path, "area": f.area, "text": f.text}) + "\n")
    write_calibration(files)
    train_tokenizer([f.text for f in files if f.split == "train"])
    for split in ("train", "heldout"):
        chosen = [f for f in files if f.split == split]
        print(f"{split}: {len(chosen)} files, {sum(len(f.text.encode()) for f in chosen) / 1e6:.2f} MB")
    sizes = {split: Counter[str]() for split in ("train", "heldout")}
    for f in files:
        sizes[f.split][f.area] += len(f.text.encode())
    for area in AREAS:
        print(
            f"  {area:12} train {sizes['train'][area] / 1e3:8.0f} KB, held-out {sizes['heldout'][area] / 1e3:6.0f} KB"
        )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="only compare this interpreter's files with the list")
    parser.add_argument("--calibration", action="store_true", help="only write the calibration text")
    arguments = parser.parse_args()
    if arguments.calibration:
        write_calibration(list(sources(stdlib())))
        return 0
    if not arguments.check:
        write(list(sources(stdlib())))
        return 0
    try:
        texts = read_training_texts(LIST, stdlib())
    except UserError as error:
        print(error, file=sys.stderr)
        return 1
    print(f"{len(texts)} training files, as on the list")
    return 0


if __name__ == "__main__":
    sys.exit(main())
