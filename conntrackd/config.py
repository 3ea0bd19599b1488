"""The configuration: TOML, read once, checked as a whole (docs/config.md is its reference).

`load` gives a Config or raises ConfigErrors with everything that is wrong, each mistake at its place. The models say
what may stand in the files; what they cannot say in types is in the functions in front of them. A key of the file is a
field of a model, and a sysctl is whatever core/sysctl.py has: nothing is listed twice.
"""

import re
import tomllib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import cache
from importlib.resources import files as package_files
from pathlib import Path
from typing import Annotated, Any, Final, Literal, get_args

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    GetCoreSchemaHandler,
    GetJsonSchemaHandler,
    PlainValidator,
    PrivateAttr,
    ValidationError,
    ValidationInfo,
    create_model,
    field_validator,
    model_validator,
)
from pydantic_core import CoreSchema, ErrorDetails, core_schema

from conntrackd import values
from conntrackd.configfiles import Files, SourceFile, read
from conntrackd.const import IPPROTO_TCP, LABELS_MAX
from conntrackd.core.helpers import HELPERS
from conntrackd.core.sysctl import BYTES, NUMBERS, TIMEOUTS, Sysctl
from conntrackd.core.tuples import PROTOCOL_NAMES
from conntrackd.mistakes import ConfigError, ConfigErrors, any_of, mistake, nearest, shown
from conntrackd.tomlplaces import Span
from conntrackd.values import WITH_PORTS, WITH_TYPES, Addresses, Network, Rate, Source, Traffic

__all__ = ["Config", "ConfigError", "ConfigErrors", "Network", "load", "parse"]

DEFAULT_FILE: Final = "/etc/conntrackd/conntrackd.toml"
SERVICES: Final = package_files("conntrackd").joinpath("services.toml")

RESERVED_ZONES: Final = ("self", "any")
RESERVED_RULES: Final = ("default-forward", "default-input", "default-output", "default-related", "default-invalid")
ZONES_MAX: Final = 1000

MARK_BITS: Final = 6
OPTIONS_MAX: Final = 16  # that an error lists
SET_FILE_ERRORS: Final = 20  # a file that is something else altogether has as many mistakes as lines

Verdict = Literal["accept", "drop"]
Answered = Literal["accept", "drop", "reject"]


# --- Checks of single values ------------------------------------------------------------------------------------


@dataclass
class Names:
    """What checks must know of the rest of the configuration, and the names met so far."""

    zones: list[str]
    sets: list[str]
    services: dict[str, tuple[Traffic, ...]]  # own and shipped; empty: an own one that is wrong
    labels: dict[str, Any]
    rules: set[str] = field(default_factory=set)
    interfaces: set[tuple[str, Network | None]] = field(default_factory=set)
    bits: set[int] = field(default_factory=set)  # of labels


def _listed(value: object) -> object:
    """Let one value stand for a list of one."""
    return tuple(value) if isinstance(value, list) else (value,)


def _name(value: str) -> str:
    if not re.fullmatch(r"\w[\w.-]{0,62}", value):
        raise mistake(f"{value!r} is no name (expected up to 63 letters, digits, '-', '_' or '.')")
    return value


def _a_second(milliseconds: int) -> int:
    if milliseconds < 1000:
        raise mistake("that is more often than the daemon can look", "once a second is the most")
    return milliseconds


def _zone_definition(value: str) -> str:
    if value in RESERVED_ZONES:
        raise mistake(f"zone {value!r} is built in and cannot be defined", "choose another name")
    return _name(value)


def _zone(value: str, info: ValidationInfo[Names]) -> str:
    options = (*info.context.zones, *RESERVED_ZONES)
    if value not in options:
        raise mistake(f"unknown zone {value!r} (expected {any_of(options)})", nearest(value, options))
    return value


def _interface(value: str, info: ValidationInfo[Names]) -> str:
    if not re.fullmatch(r"[^\s/*]{0,14}[^\s/*+]|[^\s/*]{0,14}\*", value):
        hint = f"did you mean '{value[:-1]}*'?" if value.endswith("+") else ""
        raise mistake(f"{value!r} is no interface (expected a name as eth1 or a beginning as veth*)", hint)
    for network in info.data.get("sources") or (None,):
        if (value, network) in info.context.interfaces:
            what = f"{network} at interface {value!r}" if network else f"interface {value!r}"
            raise mistake(f"{what} already belongs to a zone", "an interface is in one zone only")
        info.context.interfaces.add((value, network))
    return value


def _rule_name(value: str, info: ValidationInfo[Names]) -> str:
    if value in RESERVED_RULES:
        raise mistake(f"rule name {value!r} is built in", "choose another name")
    if value in info.context.rules:
        raise mistake(f"rule name {value!r} is used twice", "give each rule its own name")
    info.context.rules.add(value)
    return _name(value)


def _source(value: object, info: ValidationInfo[Names]) -> Source:
    return values.source(value, info.context.sets)


def _icmp_type(value: object, info: ValidationInfo[Names]) -> tuple[tuple[int, int], ...]:
    """Read an ICMP type for each of the rule's protocols that has it."""
    protocols = [number for number in info.data.get("protocol", ()) if number in WITH_TYPES]
    return values.icmp_type(value, protocols or list(WITH_TYPES))  # the rule as a whole is checked later


def _service(value: str, info: ValidationInfo[Names]) -> str:
    services = info.context.services
    if value not in services:
        hint = nearest(value, list(services)) or f"define it: [services] {value} = ['tcp/PORT']"
        raise mistake(f"unknown service {value!r}", hint)
    return value


def _label_definition(value: str) -> str:
    if value.isdigit():
        raise mistake(f"the label {value!r} is a number: these are bits without a name", "choose another name")
    return _name(value)


def _bit(value: int, info: ValidationInfo[Names]) -> int:
    if value in info.context.bits:
        owner = next(name for name, bit in info.context.labels.items() if bit == value)
        raise mistake(f"bit {value} is the label {owner!r} already", "give each label a bit of its own")
    info.context.bits.add(value)
    return value


def _label(value: str, info: ValidationInfo[Names]) -> str:
    labels = info.context.labels
    if value not in labels:
        raise mistake(f"unknown label {value!r}", nearest(value, list(labels)) or f"define it: [labels] {value} = BIT")
    return value


def _helper(value: str) -> str:
    if value not in HELPERS:
        raise mistake(f"unknown helper {value!r} (expected {any_of(sorted(HELPERS))})", nearest(value, sorted(HELPERS)))
    return value


def _state(value: object) -> object:
    if value == "established":
        raise mistake("rules are not asked about established connections: they pass by themselves", "leave it out")
    return value


def _require_protocol(key: str, fitting: Sequence[int], info: ValidationInfo[Names]) -> None:
    """Complain about a key that only some protocols have in a rule that is not about these alone."""
    if "protocol" not in info.data:
        return  # it is wrong itself
    protocols = info.data["protocol"]
    if not protocols or not set(protocols) <= set(fitting):
        names = [PROTOCOL_NAMES[number] for number in fitting]
        hint = "" if protocols else f"add protocol = {names[0]!r}"
        raise mistake(f"'{key}' needs a protocol that has it (expected {any_of(names)})", hint)


def _switch(value: object) -> int:
    if value not in (0, 1) or not isinstance(value, int):  # True is 1, 1.0 is not an int
        raise mistake(f"{shown(value)} is no switch (expected 0, 1, false or true)")
    return int(value)


def _mark_mask(value: int) -> int:
    if value.bit_count() < MARK_BITS:
        raise mistake(
            f"mark_mask {value:#x} has {value.bit_count()} bits set (expected at least {MARK_BITS})",
            "the default is 0xfc000000",
        )
    return value


def _listen(value: str) -> str:
    values.endpoint(value)
    return value


def _different(value: tuple[int, ...]) -> tuple[int, ...]:
    if len(set(value)) < len(value):
        raise mistake("both queues have the same number", "prerouting and postrouting need a queue each")
    return value


def _directory(value: str) -> str:
    if value and not value.startswith("/"):
        raise mistake(f"{value!r} is no directory (expected a path from / on, or '' for none)")
    return value


# The types of the file's values: what reads them, and what an editor is told of them (`conntrackd schema`).
class OneOrMany:
    """Lets one value stand for a list of one, and says so in the schema."""

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        """Make a list of the value before it is checked as one."""
        return core_schema.no_info_before_validator_function(_listed, handler(source))

    def __get_pydantic_json_schema__(self, schema: CoreSchema, handler: GetJsonSchemaHandler) -> dict[str, Any]:
        """Describe both forms."""
        many = handler(schema)
        return {"anyOf": [many["items"], many]}


Listed = OneOrMany()
NotEmpty = Field(min_length=1)
U32 = Annotated[int, Field(ge=0, le=0xFFFFFFFF)]
U8 = Annotated[int, Field(ge=0, le=0xFF)]
Name = Annotated[str, AfterValidator(_name)]
Time = Annotated[int, PlainValidator(values.time, json_schema_input_type=int | str)]
RateField = Annotated[Rate, PlainValidator(values.rate, json_schema_input_type=str)]
Networks = Annotated[
    tuple[Annotated[Network, PlainValidator(values.network, json_schema_input_type=str)], ...], Listed, NotEmpty
]
Sources = Annotated[
    tuple[Annotated[Source, PlainValidator(_source, json_schema_input_type=str)], ...], Listed, NotEmpty
]
Zones = Annotated[tuple[Annotated[str, AfterValidator(_zone)], ...], Listed, NotEmpty]
Protocols = Annotated[
    tuple[Annotated[int, PlainValidator(values.protocol, json_schema_input_type=int | str)], ...], Listed, NotEmpty
]
Ports = Annotated[
    tuple[Annotated[tuple[int, int], PlainValidator(values.port, json_schema_input_type=int | str)], ...],
    Listed,
    NotEmpty,
]
IcmpTypes = Annotated[
    tuple[Annotated[tuple[tuple[int, int], ...], PlainValidator(_icmp_type, json_schema_input_type=int | str)], ...],
    Listed,
    NotEmpty,
]
States = Annotated[
    tuple[Annotated[Literal["new", "related", "invalid"], BeforeValidator(_state)], ...], Listed, NotEmpty
]
ServiceEntries = Annotated[
    tuple[Annotated[tuple[Traffic, ...], PlainValidator(values.traffic, json_schema_input_type=str)], ...],
    Listed,
    NotEmpty,
]


# --- What may stand in the file ---------------------------------------------------------------------------------


class Section(BaseModel):
    """A table of the file: unknown keys are mistakes, and so is a string where a number belongs."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


class Queue(Section):
    """[queue]: how packets come from the kernel."""

    numbers: Annotated[
        tuple[Annotated[int, Field(ge=0, le=65535)], ...],
        Listed,
        Field(min_length=2, max_length=2),
        AfterValidator(_different),
    ] = (0, 1)  # prerouting, postrouting
    bypass: bool = False
    max_length: Annotated[int, Field(ge=1, le=0xFFFFFFFF)] = 4096  # packets
    mark_mask: Annotated[U32, AfterValidator(_mark_mask)] = 0xFC000000
    gso: bool = True
    socket_buffer: Annotated[int, Field(ge=65536, le=1 << 30)] = 8 << 20  # bytes


class Rules(Section):
    """[rules]: how the kernel's rules are installed."""

    iptables: Literal["iptables", "iptables-legacy", "iptables-nft"] = "iptables-legacy"
    at_start: Literal["install", "leave"] = "install"
    at_stop: Literal["keep", "remove"] = "keep"
    watch: Literal["off", "warn", "repair"] = "repair"
    watch_every: Annotated[Time, AfterValidator(_a_second)] = 10_000  # ms


class Zone(Section):
    """One entry of [zones]."""

    conntrack_zone: Annotated[int, Field(ge=0, le=0xFFFF)] = 0
    sources: Networks = ()
    interfaces: Annotated[tuple[Annotated[str, AfterValidator(_interface)], ...], Listed, NotEmpty] = ()

    @model_validator(mode="after")
    def _says_where(self) -> "Zone":
        if not self.sources and not self.interfaces:
            raise mistake("the zone does not say where it is", "add interfaces = ['eth1'] or sources = ['10.0.0.0/8']")
        return self


class Set(Section):
    """One entry of [sets]."""

    addresses: Annotated[
        tuple[Annotated[Network, PlainValidator(values.network, json_schema_input_type=str)], ...], Listed
    ] = ()
    file: str = ""
    timeout: Time = 0  # ms, of an address that is added while the daemon runs; 0 = none
    size: Annotated[int, Field(ge=0, le=1 << 24)] = 65536  # addresses that may be added while the daemon runs


class Policy(Section):
    """[policy]: what happens when no rule matches, and to packets that rules are not asked about."""

    default: Answered = "drop"
    input: Answered = "drop"
    output: Answered = "accept"
    invalid: Verdict = "drop"
    fragment: Verdict = "drop"
    related: Verdict = "accept"
    log_denied: bool = False
    log_limit: RateField = Field(default_factory=lambda: Rate(10, 1000))
    reject_limit: RateField = Field(default_factory=lambda: Rate(100, 1000))


class OnException(Section):
    """[exception]: what happens to packets when something that should not happen does."""

    table_full: Verdict = "drop"
    internal_error: Verdict = "drop"
    queue_overflow: Verdict = "drop"
    suspend: Literal["expire", "keep"] = "expire"


class Reload(Section):
    """[reload]: what a new policy does to the connections that are there."""

    rejudge: bool = False


class State(Section):
    """[state]: what outlives the process."""

    directory: Annotated[str, AfterValidator(_directory)] = "/var/lib/conntrackd"  # "": nothing does
    snapshot: Time = 30_000  # ms; 0 = only when the daemon stops


class Metrics(Section):
    """[metrics]: the counters for Prometheus."""

    listen: Annotated[str, AfterValidator(_listen)] = ""  # empty: nowhere


class Limit(Section):
    """`limit` of a rule."""

    new: RateField
    burst: Annotated[int, Field(ge=1, le=1_000_000)] | None = None
    per: Literal["rule", "src", "dst"] = "rule"


class Rule(Section):
    """One [[rule]]. Empty tuples match everything."""

    name: Annotated[str, AfterValidator(_rule_name)]
    from_: Zones = Field(default=("any",), alias="from")
    to: Zones = ("any",)
    source: Sources = ()
    destination: Sources = ()
    protocol: Protocols = ()
    port: Ports = ()
    icmp_type: IcmpTypes = ()
    service: Annotated[tuple[Annotated[str, AfterValidator(_service)], ...], Listed, NotEmpty] = ()
    state: States = ("new",)
    action: Literal["accept", "drop", "reject", "log", "notrack"]
    reject_with: Literal["auto", "tcp-reset", "port-unreachable", "host-unreachable", "admin-prohibited"] = "auto"
    limit: Limit | None = None
    max_flows: Annotated[int, Field(ge=1)] = 0  # 0 = no limit, as below
    max_flows_per_src: Annotated[int, Field(ge=1)] = 0
    log: bool = False
    mark: U32 | None = None
    labels: Annotated[tuple[Annotated[str, AfterValidator(_label)], ...], Listed, NotEmpty] = ()
    helper: Annotated[str, AfterValidator(_helper)] = ""
    timeouts: Annotated[dict[str, int], BeforeValidator(lambda value: _timeouts(value))] = {}

    _traffic: tuple[Traffic, ...] = PrivateAttr(default=())

    @field_validator("port")
    @classmethod
    def _port_needs_protocol(cls, value: object, info: ValidationInfo[Names]) -> object:
        _require_protocol("port", WITH_PORTS, info)
        return value

    @field_validator("icmp_type")
    @classmethod
    def _icmp_type_needs_protocol(cls, value: object, info: ValidationInfo[Names]) -> object:
        _require_protocol("icmp_type", WITH_TYPES, info)
        return value

    @field_validator("service")
    @classmethod
    def _service_alone(cls, value: object, info: ValidationInfo[Names]) -> object:
        for key in ("protocol", "port", "icmp_type"):
            if info.data.get(key):
                raise mistake(f"'service' and {key!r} cannot stand in one rule", "a service has its protocols")
        return value

    @model_validator(mode="after")
    def _as_a_whole(self, info: ValidationInfo[Names]) -> "Rule":
        self._traffic = tuple(_traffic_of(self, info.context.services))
        given = self.model_fields_set
        if self.action == "notrack" or "invalid" in self.state:
            about = "action = 'notrack'" if self.action == "notrack" else "state = 'invalid'"
            if self.to != ("any",):
                raise mistake(
                    f"a rule with {about} cannot name 'to': it is asked before the way out is known",
                    "leave it out",
                    "to",
                )
        if self.action == "notrack" and "state" in given:
            raise mistake("a rule with action = 'notrack' has no state: nothing is tracked", "leave it out", "state")
        for key in ("limit", "max_flows", "max_flows_per_src", "mark", "labels", "helper", "timeouts"):
            if key in given and self.action != "accept":
                raise mistake(f"{key!r} is of no use with action = {self.action!r}", "it needs action = 'accept'", key)
            if key in given and "invalid" in self.state:
                raise mistake(f"{key!r} is about connections, and an INVALID packet has none", "leave it out", key)
        if "reject_with" in given and self.action != "reject":
            raise mistake(
                f"'reject_with' is of no use with action = {self.action!r}", "it needs action = 'reject'", "reject_with"
            )
        helped = HELPERS[self.helper].protocols if self.helper else ()
        if helped and self._traffic and not any(entry.protonum in helped for entry in self._traffic):
            speaks = any_of([PROTOCOL_NAMES[number] for number in helped])
            raise mistake(f"helper {self.helper!r} reads {speaks}, and the rule is about none of it", "", "helper")
        tcp_only = bool(self._traffic) and all(entry.protonum == IPPROTO_TCP for entry in self._traffic)
        if self.reject_with == "tcp-reset" and not tcp_only:
            raise mistake(
                "'tcp-reset' answers TCP only, and the rule is not about TCP alone",
                "use 'auto', or add protocol = 'tcp'",
                "reject_with",
            )
        return self

    def traffic(self) -> tuple[Traffic, ...]:
        """What protocols and ports it is about; empty: all."""
        return self._traffic


def _traffic_of(rule: Rule, services: dict[str, tuple[Traffic, ...]]) -> list[Traffic]:
    """Write protocol, port, icmp_type and service of a rule in one form."""
    if rule.service:
        return [entry for name in rule.service for entry in services[name]]
    if rule.port:
        return [Traffic(protonum, *ports) for protonum in rule.protocol for ports in rule.port]
    if rule.icmp_type:
        pairs = [pair for types in rule.icmp_type for pair in types]
        return [Traffic(protonum, kind << 8, kind << 8 | 255) for protonum, kind in pairs]
    return [Traffic(protonum, 0, 65535) for protonum in rule.protocol]


def _sysctl_fields(names: Sequence[str]) -> dict[str, Any]:
    """Make a field of each of these settings of the tracker. One that is 0 or 1 by default is a switch."""
    defaults = Sysctl()
    fields: dict[str, Any] = {}
    for name in names:
        default = getattr(defaults, name)
        check: Callable[..., int] | None = None
        kind: Any = int
        if name in TIMEOUTS:
            check, kind = values.timeout, int | str
        elif default in (0, 1) and name not in NUMBERS:
            check, kind = _switch, bool | int
        number = U8 if name in BYTES else U32
        typed = Annotated[int, PlainValidator(check, json_schema_input_type=kind)] if check else number
        fields[name] = (typed, default)
    return fields


def _settings() -> list[str]:
    defaults = Sysctl()
    names = [name for name in dir(defaults) if not name.startswith("_")]
    return [name for name in names if isinstance(getattr(defaults, name), int)]


Conntrack = create_model("Conntrack", __base__=Section, **_sysctl_fields(_settings()))
# What a rule may set for its connections alone.
Timeouts = create_model("Timeouts", __base__=Section, **_sysctl_fields(sorted(TIMEOUTS - {"unconfirmed_timeout"})))


def _sysctls(value: object) -> dict[str, int]:
    """Check [conntrack]; returns the settings that it names, in the units of Sysctl."""
    return Conntrack.model_validate(value).model_dump(exclude_unset=True)


def _timeouts(value: object) -> dict[str, int]:
    return Timeouts.model_validate(value).model_dump(exclude_unset=True)


class Config(Section):
    """All files as one."""

    version: Annotated[int, Field(ge=1, le=1)]
    queue: Queue = Queue()
    rules: Rules = Rules()
    conntrack: Annotated[dict[str, int], BeforeValidator(_sysctls)] = {}
    zones: Annotated[dict[Annotated[str, AfterValidator(_zone_definition)], Zone], Field(max_length=ZONES_MAX)] = {}
    sets: dict[Name, Set] = {}
    services: dict[Name, ServiceEntries] = {}
    labels: dict[
        Annotated[str, AfterValidator(_label_definition)],
        Annotated[int, Field(ge=0, le=LABELS_MAX - 1), AfterValidator(_bit)],
    ] = {}
    policy: Policy = Field(default_factory=Policy)
    exception: OnException = OnException()
    reload: Reload = Reload()
    state: State = State()
    metrics: Metrics = Metrics()
    rule: Annotated[tuple[Rule, ...], Field(strict=False)] = ()

    _files: Files = PrivateAttr()
    _addresses: dict[str, Addresses] = PrivateAttr(default_factory=dict)

    def files(self) -> Files:
        """The files that it was read from."""
        return self._files

    def addresses(self, name: str) -> Addresses:
        """What stands in a set."""
        return self._addresses[name]

    def sysctl(self) -> Sysctl:
        """Make the tracker's settings: its defaults, changed as [conntrack] says."""
        sysctl = Sysctl()
        for name, value in self.conntrack.items():
            setattr(sysctl, name, value)
        return sysctl


# --- Reading ----------------------------------------------------------------------------------------------------


def load(path: str | Path) -> Config:
    """Read and check a configuration file, and conf.d/*.toml beside it; raises ConfigErrors."""
    return check(read(path))


def parse(source: bytes, file: str) -> Config:
    """Check the text of a file, which is called `file` in errors; raises ConfigErrors."""
    return check([SourceFile(file, source)])


def check(sources: Sequence[SourceFile]) -> Config:
    """Check the texts of files, the main one first; raises ConfigErrors. Files of sets are read beside the main one."""
    files = Files(sources)
    errors = files.errors
    addresses = _read_sets(files)
    names = Names(
        zones=_keys_of(files, "zones"),
        sets=_keys_of(files, "sets"),
        services=_services(files),
        labels={name: files.data["labels"][name] for name in _keys_of(files, "labels")},
    )
    names.zones = [name for name in names.zones if name not in RESERVED_ZONES]
    try:
        config = Config.model_validate(files.data, context=names)
    except ValidationError as invalid:
        errors += [_located(files, details) for details in invalid.errors()]
    if errors:
        raise ConfigErrors(sorted(errors, key=files.order))
    for name, section in config.sets.items():
        for network in section.addresses:
            addresses[name].add(network)
    config._files = files
    config._addresses = addresses
    return config


def _keys_of(files: Files, key: str) -> list[str]:
    table = files.data.get(key)
    return list(table) if isinstance(table, dict) else []


@cache
def shipped_services() -> dict[str, tuple[Traffic, ...]]:
    """The services that come with conntrackd, by name."""
    table = tomllib.loads(SERVICES.read_text())["services"]
    return {name: _service_traffic(entries) for name, entries in table.items()}


def _service_traffic(entries: object) -> tuple[Traffic, ...]:
    listed = entries if isinstance(entries, list) else [entries]
    return tuple(part for entry in listed for part in values.traffic(entry))


def _services(files: Files) -> dict[str, tuple[Traffic, ...]]:
    """Find all services that rules may name. Own ones come first, and replace shipped ones of their name."""
    own: dict[str, tuple[Traffic, ...]] = {}
    for name in _keys_of(files, "services"):
        try:
            own[name] = _service_traffic(files.data["services"][name])
        except ValueError:
            own[name] = ()  # the model will say what is wrong with it
    return own | {name: entries for name, entries in shipped_services().items() if name not in own}


def _read_sets(files: Files) -> dict[str, Addresses]:
    """Read the files of the sets. What is wrong with them goes to the errors of `files`."""
    found: dict[str, Addresses] = {}
    for name in _keys_of(files, "sets"):
        found[name] = Addresses()
        section = files.data["sets"][name]
        file = section.get("file") if isinstance(section, dict) else None
        if not isinstance(file, str) or not file:
            continue
        path = Path(files.files[0].name).parent / file
        try:
            with path.open() as lines:
                files.errors.extend(_read_set(found[name], path, lines))
        except OSError as error:
            reason = str(error.strerror).lower()
        except UnicodeDecodeError:
            reason = "the text is not UTF-8"
        else:
            continue
        message = f"the file {str(path)!r} of the set cannot be read: {reason}"
        files.errors.append(files.error(("sets", name, "file"), False, message, ""))
    return found


def _read_set(addresses: Addresses, path: Path, lines: Iterable[str]) -> list[ConfigError]:
    """Read addresses, one a line; # begins a comment."""
    errors: list[ConfigError] = []
    add = addresses.add_text
    for number, line in enumerate(lines, start=1):
        if add(line.rstrip("\n")):
            continue
        word = line.partition("#")[0].strip()
        if not word or add(word):
            continue
        try:
            values.network(word)
            message, hint = f"{word!r} is no address or network", ""
        except ValueError as wrong:
            context = getattr(wrong, "context", None) or {}
            message, hint = context.get("message", str(wrong)), context.get("hint", "")
        column = line.index(word) + 1
        span = Span(number, column, column + len(word))
        if len(errors) == SET_FILE_ERRORS:
            break
        errors.append(ConfigError(str(path), *span, message, hint, line.rstrip("\r\n")))
    return errors


def _located(files: Files, details: ErrorDetails) -> ConfigError:
    path = details["loc"]
    message, hint = _sentence(details)
    key = str(details.get("ctx", {}).get("key") or "") if details["type"] == "mistake" else ""
    if key:
        return files.error((*path, key), False, message, hint)
    if path[-1] == "[key]":
        return files.error(path[:-1], True, message, hint)
    return files.error(path, details["type"] == "extra_forbidden", message, hint)


# What pydantic calls a wrong type, in the words of TOML.
TYPE_NAMES: Final = {
    "int_type": "a whole number",
    "string_type": "text in quotes",
    "bool_type": "true or false",
    "model_type": "a table",
    "model_attributes_type": "a table",
    "dict_type": "a table",
    "tuple_type": "a list of tables, each headed by [[rule]]",
}


def _sentence(details: ErrorDetails) -> tuple[str, str]:
    """Say what is wrong and what to do about it, in the words of the file."""
    kind, value, context = details["type"], details["input"], details.get("ctx", {})
    path = details["loc"]
    key = next((step for step in reversed(path) if isinstance(step, str)), "")
    if kind == "mistake":
        return context["message"], context["hint"]
    if kind == "extra_forbidden":
        options = _keys(path[:-1])
        hint = nearest(key.removeprefix("nf_conntrack_"), options)
        # A long list helps nobody, and nobody who was near.
        expected = "" if hint or len(options) > OPTIONS_MAX else f" (expected {any_of(options)})"
        return f"unknown key {key!r}{expected}", hint
    if kind == "missing":
        return f"the key {key!r} is missing", ""
    if kind == "literal_error":
        options = re.findall(r"'([^']*)'", context["expected"])
        return f"unknown {key} {shown(value)} (expected {any_of(options)})", nearest(value, options)
    if kind == "greater_than_equal":
        return f"{key} {shown(value)} is too small (expected at least {context['ge']})", ""
    if kind == "less_than_equal":
        return f"{key} {shown(value)} is too large (expected at most {context['le']})", ""
    if kind == "too_short":
        return f"{key!r} lists too few (expected at least {context['min_length']})", ""
    if kind == "too_long":
        return f"{key!r} lists too many (expected at most {context['max_length']})", ""
    if key == "rules" and isinstance(value, list):
        return "'rules' is about iptables and no list of rules", "did you mean [[rule]]?"
    if kind in TYPE_NAMES:
        return f"{key!r} cannot be {shown(value)} (expected {TYPE_NAMES[kind]})", ""
    return f"{key!r}: {details['msg']}", ""


def _keys(table: Sequence[str | int]) -> list[str]:
    """List the keys that the table at this path may have."""
    model: type[BaseModel] = Config
    for step in table:
        if step == "conntrack":
            model = Conntrack
        elif step == "timeouts":
            model = Timeouts
        elif isinstance(step, str) and (annotation := _field(model, step)) is not None:
            nested = [part for part in (annotation, *get_args(annotation)) if _is_section(part)]
            model = nested[0] if nested else model
    return sorted(field.alias or name for name, field in model.model_fields.items())


def _field(model: type[BaseModel], key: str) -> Any:
    found = [field for name, field in model.model_fields.items() if key in (name, field.alias)]
    return found[0].annotation if found else None


def _is_section(kind: object) -> bool:
    return isinstance(kind, type) and issubclass(kind, Section)
