#!/usr/bin/env python3
"""The text that the demonstration model learns from: the Python source of this interpreter's standard library.

    python scripts/demo_data.py             write the list of files, the held-out text and the tokenizer
    python scripts/demo_data.py --check     say whether this interpreter's files are those of the list

The list (models/data/files.tsv) names every file with its SHA-256, its split and its subject area; the split follows
from a hash of the path. The held-out text itself is in models/data/heldout.jsonl, so that an evaluation needs no
particular interpreter; training needs the one whose files are on the list (CPython 3.12.1, its tests included).
"""

import argparse
import dataclasses
import fnmatch
import hashlib
import json
import sys
import sysconfig
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
DATA = ROOT / "models" / "data"
LIST = DATA / "files.tsv"
HELDOUT = DATA / "heldout.jsonl"
MODEL = ROOT / "models" / "demo"
HELDOUT_PERCENT = 8
# Some of the largest files are a third of their area: this salt of the hash is one of few that hold at least a
# twentieth of every area out, and less than 3 MB in all.
SPLIT_SALT = "2938"
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
    "modules": "importlib/* import/* import* pkg* *runpy* zipimport* site* sysconfig* venv/* ensurepip/* *venv* module* "
    "compileall py_compile frozen* distutils* __*__ relimport getpath package*",
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


def read_training_texts(folder: Path | None = None) -> list[str]:
    """The training files of the committed list, in its order; a ValueError names the first that this interpreter lacks.

    Args:
        folder: the standard library to read, this interpreter's by default.
    """
    folder = folder or stdlib()
    texts = []
    for line in LIST.read_text().splitlines()[1:]:
        name, sha256, split, _ = line.split("\t")
        if split != "train":
            continue
        raw = (folder / name).read_bytes() if (folder / name).is_file() else b""
        if hashlib.sha256(raw).hexdigest() != sha256:
            what = "differs from the list's" if raw else "is missing"
            raise ValueError(f"{folder / name} {what}; {LIST.name} was made with CPython 3.12.1, its tests included")
        texts.append(raw.decode())
    return texts


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


def write(files: list[Source]) -> None:
    """Write list, held-out text and tokenizer."""
    DATA.mkdir(parents=True, exist_ok=True)
    rows = ["path\tsha256\tsplit\tarea"] + [f"{f.path}\t{f.sha256}\t{f.split}\t{f.area}" for f in files]
    LIST.write_text("\n".join(rows) + "\n")
    heldout = [f for f in files if f.split == "heldout"]
    with HELDOUT.open("w") as out:
        for f in heldout:
            out.write(json.dumps({"path": f.path, "area": f.area, "text": f.text}) + "\n")
    train_tokenizer([f.text for f in files if f.split == "train"])
    for split in ("train", "heldout"):
        chosen = [f for f in files if f.split == split]
        print(f"{split}: {len(chosen)} files, {sum(len(f.text.encode()) for f in chosen) / 1e6:.2f} MB")
    sizes = {split: Counter[str]() for split in ("train", "heldout")}
    for f in files:
        sizes[f.split][f.area] += len(f.text.encode())
    for area in AREAS:
        print(f"  {area:12} train {sizes['train'][area] / 1e3:8.0f} KB, held-out {sizes['heldout'][area] / 1e3:6.0f} KB")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="only compare this interpreter's files with the list")
    arguments = parser.parse_args()
    if not arguments.check:
        write(list(sources(stdlib())))
        return 0
    try:
        texts = read_training_texts()
    except ValueError as error:
        print(error, file=sys.stderr)
        return 1
    print(f"{len(texts)} training files, as on the list")
    return 0


if __name__ == "__main__":
    sys.exit(main())
