"""The GStreamer element ``inflightdetect``: a verdict on each buffer, as metadata and as a message on the bus.

GStreamer loads this file when GST_PLUGIN_PATH names the folder above ``python`` and its loader of Python plugins is
installed.  Nothing else imports it.
"""

from __future__ import annotations

import gi

gi.require_version("GstBase", "1.0")

from gi.repository import GLib, GObject, Gst, GstBase  # noqa: E402

from inflight_edge.detector import Detector  # noqa: E402
from inflight_edge.errors import DataError, InflightError  # noqa: E402
from inflight_edge.gstreamer import CAPS, MESSAGE, Layout, attach, judge, load, verdict_fields  # noqa: E402
from inflight_edge.verdict import Decision, Verdict  # noqa: E402

load()
_CAPS = Gst.Caps.from_string(CAPS)


class InflightDetect(GstBase.BaseTransform):  # type: ignore[misc]
    """Judges each buffer with the detector of a bundle; the pixels pass unchanged.

    The verdict is custom metadata (GstCustomMeta, InflightVerdictMeta), which other elements carry along, and an element
    message with the same fields.
    Fails closed: what cannot be judged is invalid, and a buffer whose verdict cannot be attached is an error.
    """

    __gtype_name__ = "InflightDetect"
    __gstmetadata__ = (
        "Backdoor trigger detector",
        "Filter/Analyzer/Video",
        "Judges each frame with an inflight-edge bundle",
        "inflight-edge",
    )
    __gsttemplates__ = (
        Gst.PadTemplate.new("sink", Gst.PadDirection.SINK, Gst.PadPresence.ALWAYS, _CAPS),
        Gst.PadTemplate.new("src", Gst.PadDirection.SRC, Gst.PadPresence.ALWAYS, _CAPS),
    )

    bundle = GObject.Property(type=str, default="", nick="bundle", blurb="Folder of the bundle")
    engine = GObject.Property(type=str, default="onnxruntime", nick="engine", blurb="What runs the classifier")
    precision = GObject.Property(type=str, default="fp32", nick="precision", blurb="fp32, fp16 or int8")
    key = GObject.Property(
        type=str, default="", nick="key", blurb="Public key (PEM) that must have signed the bundle; empty: not checked"
    )
    scorer = GObject.Property(type=str, default="auto", nick="scorer", blurb="auto, cpu, cuda, triton or reference")
    threads = GObject.Property(
        type=int, default=0, minimum=0, maximum=1024, nick="threads", blurb="Threads of the engine, 0: its own choice"
    )
    alpha = GObject.Property(
        type=float, default=0.0, minimum=0.0, maximum=1.0, nick="alpha", blurb="Rate of false alarms, 0: no limit"
    )
    drop_refused = GObject.Property(
        type=bool, default=False, nick="drop refused", blurb="Pass on only buffers whose verdict passes"
    )

    def __init__(self) -> None:
        super().__init__()
        self.set_in_place(True)
        self.set_passthrough(False)  # else the buffers could not carry anything new
        self._detector: Detector | None = None
        self._layout: Layout | DataError = DataError("no caps came before the buffer")
        self._index = 0

    def do_start(self) -> bool:
        """Load the bundle; an error on the bus when that fails."""
        self._index = 0
        if not self.bundle:  # else the working folder would be meant
            return self._fail("bundle: expected the folder of a bundle, got none; write bundle=FOLDER")
        try:
            self._detector = Detector.load(
                self.bundle,
                engine=self.engine,
                precision=self.precision,
                key=self.key or None,
                scorer=self.scorer,
                threads=self.threads or None,
                alpha=self.alpha or None,
            )
        except InflightError as error:
            return self._fail(str(error))
        except Exception as error:  # noqa: BLE001 - an exception in a callback would be printed, and the start succeed
            return self._fail(f"{type(error).__name__}: {error}")
        return True

    def do_stop(self) -> bool:
        """Let go of the detector."""
        self._detector = None
        return True

    def do_set_caps(self, incoming: Gst.Caps, outgoing: Gst.Caps) -> bool:
        """Note the layout of the buffers that follow; one that no frame has makes them invalid."""
        try:
            self._layout = Layout.of(incoming)
        except DataError as error:
            self._layout = error
        return True

    def do_transform_ip(self, buffer: Gst.Buffer) -> Gst.FlowReturn:
        """Judge one buffer.  An exception that left this method would be printed, and the buffer passed on as it is."""
        try:
            verdict = self._judge(buffer)
        except Exception as error:  # noqa: BLE001 - whatever fails, the buffer must not pass for a judged one
            verdict = Verdict(Decision.INVALID, reason=f"{type(error).__name__}: {error}")
        try:
            return self._deliver(buffer, verdict)
        except Exception as error:  # noqa: BLE001 - else the buffer would go on without its verdict
            self._fail(f"the verdict cannot be attached: {type(error).__name__}: {error}")
            return Gst.FlowReturn.ERROR

    def _judge(self, buffer: Gst.Buffer) -> Verdict:
        if isinstance(self._layout, DataError):
            return Verdict(Decision.INVALID, reason=str(self._layout))
        if self._detector is None:
            return Verdict(Decision.INVALID, reason="the element was not started")
        return judge(self._detector, self._layout.frame(buffer))

    def _deliver(self, buffer: Gst.Buffer, verdict: Verdict) -> Gst.FlowReturn:
        names = self._detector.class_names if self._detector else ()
        fields = {name: _value(value) for name, value in verdict_fields(verdict, names).items()}
        fields |= {"frame": _value(self._index), "pts": GObject.Value(GObject.TYPE_UINT64, buffer.pts)}
        self._index += 1
        attach(buffer, fields)
        structure = Gst.Structure.new_empty(MESSAGE)
        for name, value in fields.items():
            structure.set_value(name, value)
        self.post_message(Gst.Message.new_element(self, structure))
        if self.drop_refused and not verdict.passes:
            return Gst.FlowReturn.CUSTOM_SUCCESS  # GST_BASE_TRANSFORM_FLOW_DROPPED
        return Gst.FlowReturn.OK

    def _fail(self, text: str) -> bool:
        error = GLib.Error.new_literal(Gst.ResourceError.quark(), text, Gst.ResourceError.FAILED)
        self.post_message(Gst.Message.new_error(self, error, ""))
        return False


_TYPES = {bool: GObject.TYPE_BOOLEAN, int: GObject.TYPE_INT64, float: GObject.TYPE_DOUBLE, str: GObject.TYPE_STRING}


def _value(value: bool | int | float | str) -> GObject.Value:
    return GObject.Value(_TYPES[type(value)], value)


GObject.type_register(InflightDetect)
__gstelementfactory__ = ("inflightdetect", Gst.Rank.NONE, InflightDetect)
