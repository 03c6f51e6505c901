package wire

import (
	"encoding/binary"
	"encoding/json"
	"fmt"
	"net/netip"
	"unicode/utf8"
)

// Kind is the first byte of an OPEN's payload: what the stream is.
type Kind uint8

// The kinds of protocol version 1.
const (
	KindHello     Kind = 1 // call: Hello → HelloReply; the first stream of every tunnel
	KindTCP       Kind = 2 // stream: a TCP flow
	KindUDP       Kind = 3 // messages: a UDP flow, one datagram each
	KindDNS       Kind = 4 // call: a DNS message (RFC 1035, section 4) → a DNS message
	KindControl   Kind = 5 // call: method and JSON body → JSON
	KindWatch     Kind = 6 // stream: method and JSON body, then newline-delimited JSON values from the acceptor
	KindIntercept Kind = 7 // stream or messages: an intercepted flow on its way to the laptop
	KindEcho      Kind = 8 // messages: ICMP echo requests, and the replies; each a sequence number and the data
	KindFiles     Kind = 9 // stream: SFTP with the volumes of an intercepted container

	KindPreview Kind = 10 // stream: a connection of the relay to the ingress of a preview
)

var kindNames = [...]string{
	KindHello: "hello", KindTCP: "tcp", KindUDP: "udp", KindDNS: "dns", KindControl: "control", KindWatch: "watch", KindIntercept: "intercept", KindEcho: "echo",
	KindFiles: "files", KindPreview: "preview",
}

// String returns the kind's name.
func (k Kind) String() string {
	if int(k) < len(kindNames) && kindNames[k] != "" {
		return kindNames[k]
	}
	return fmt.Sprintf("kind(%d)", uint8(k))
}

// KindOf returns the kind of an OPEN payload. An unknown kind is no error: the acceptor rejects the stream, not the session.
func KindOf(p []byte) (Kind, error) {
	if len(p) == 0 {
		return 0, violation("empty OPEN")
	}
	return Kind(p[0]), nil
}

// IP protocol numbers in an InterceptHeader.
const (
	ProtoTCP uint8 = 6
	ProtoUDP uint8 = 17
)

// FlowHeader opens a TCP or UDP flow: the application's address and where it wants to go. Src may be the zero AddrPort.
type FlowHeader struct {
	Src, Dst netip.AddrPort
}

// InterceptHeader opens a flow that was intercepted in a pod.
type InterceptHeader struct {
	Intercept string         // UID of the Intercept
	Proto     uint8          // ProtoTCP or ProtoUDP
	Src, Dst  netip.AddrPort // the client's address and the pod's, as the agent saw them; may be zero
	Port      uint16         // the intercepted container port
}

// ControlHeader is a call's or watch's method and JSON body; Body may be empty.
type ControlHeader struct {
	Method string
	Body   []byte
}

// MaxMethod and MaxUID bound the names in headers, in bytes.
const (
	MaxMethod = 128
	MaxUID    = 128
)

// AppendTCP appends an OPEN payload of KindTCP.
func AppendTCP(b []byte, h FlowHeader) []byte { return appendFlow(b, KindTCP, h) }

// AppendUDP appends an OPEN payload of KindUDP.
func AppendUDP(b []byte, h FlowHeader) []byte { return appendFlow(b, KindUDP, h) }

// AppendEcho appends an OPEN payload of KindEcho; the ports mean nothing and are sent as 0.
func AppendEcho(b []byte, src, dst netip.Addr) []byte {
	return appendFlow(b, KindEcho, FlowHeader{Src: netip.AddrPortFrom(src, 0), Dst: netip.AddrPortFrom(dst, 0)})
}

func appendFlow(b []byte, k Kind, h FlowHeader) []byte {
	return appendAddrPort(appendAddrPort(append(b, byte(k)), h.Src), h.Dst)
}

// ParseFlow reads an OPEN payload of KindTCP, KindUDP or KindEcho.
func ParseFlow(p []byte) (FlowHeader, error) {
	d := decoder{p: p}
	d.kind(KindTCP, KindUDP, KindEcho)
	h := FlowHeader{Src: d.addrPort(), Dst: d.addrPort()}
	switch {
	case d.err != nil:
	case !h.Dst.IsValid():
		d.fail("flow without destination")
	case Kind(p[0]) == KindEcho && h.Src.Port()|h.Dst.Port() != 0:
		d.fail("echo with ports")
	}
	return h, d.end()
}

// EchoHeaderLen is what precedes the data in a message of KindEcho: the sequence number.
const EchoHeaderLen = 2

// AppendEchoMessage appends a message of KindEcho.
func AppendEchoMessage(b []byte, seq uint16, data []byte) []byte {
	return append(binary.BigEndian.AppendUint16(b, seq), data...)
}

// ParseEchoMessage reads a message of KindEcho; data is a part of p.
func ParseEchoMessage(p []byte) (seq uint16, data []byte, err error) {
	if len(p) < EchoHeaderLen {
		return 0, nil, violation("echo of %d bytes", len(p))
	}
	return binary.BigEndian.Uint16(p), p[EchoHeaderLen:], nil
}

// AppendIntercept appends an OPEN payload of KindIntercept.
func AppendIntercept(b []byte, h InterceptHeader) []byte {
	b = append(b, byte(KindIntercept), h.Proto)
	b = binary.BigEndian.AppendUint16(b, h.Port)
	b = appendAddrPort(appendAddrPort(b, h.Src), h.Dst)
	return appendString(b, h.Intercept)
}

// ParseIntercept reads an OPEN payload of KindIntercept.
func ParseIntercept(p []byte) (InterceptHeader, error) {
	d := decoder{p: p}
	d.kind(KindIntercept)
	h := InterceptHeader{Proto: d.byte(), Port: d.uint16(), Src: d.addrPort(), Dst: d.addrPort(), Intercept: d.string(MaxUID)}
	switch {
	case d.err != nil:
	case h.Proto != ProtoTCP && h.Proto != ProtoUDP:
		d.fail("intercept of IP protocol %d", h.Proto)
	case h.Intercept == "":
		d.fail("intercept without UID")
	}
	return h, d.end()
}

// AppendFiles appends an OPEN payload of KindFiles: the UID of the Intercept whose container's files are wanted.
func AppendFiles(b []byte, intercept string) []byte {
	return appendString(append(b, byte(KindFiles)), intercept)
}

// ParseFiles reads an OPEN payload of KindFiles.
func ParseFiles(p []byte) (intercept string, err error) {
	d := decoder{p: p}
	d.kind(KindFiles)
	intercept = d.string(MaxUID)
	if d.err == nil && intercept == "" {
		d.fail("files without UID")
	}
	return intercept, d.end()
}

// PreviewHeader opens a connection to the ingress of a preview. Where that is stands on the preview's Intercept, and is never the opener's to say.
type PreviewHeader struct {
	ID    string
	HTTP2 bool // the opener would rather speak HTTP/2
}

// AppendPreview appends an OPEN payload of KindPreview.
func AppendPreview(b []byte, h PreviewHeader) []byte {
	b = appendString(append(b, byte(KindPreview)), h.ID)
	if h.HTTP2 {
		b = append(b, 2)
	}
	return b
}

// ParsePreview reads an OPEN payload of KindPreview.
func ParsePreview(p []byte) (PreviewHeader, error) {
	d := decoder{p: p}
	d.kind(KindPreview)
	h := PreviewHeader{ID: d.string(MaxUID)}
	if d.err == nil && h.ID == "" {
		d.fail("preview without ID")
	}
	if d.err == nil && len(d.p) > 0 {
		if h.HTTP2 = d.byte() == 2; !h.HTTP2 {
			d.fail("preview by an unknown version of HTTP")
		}
	}
	return h, d.end()
}

// AppendDNS appends an OPEN payload of KindDNS around a DNS message.
func AppendDNS(b, msg []byte) []byte { return append(append(b, byte(KindDNS)), msg...) }

// ParseDNS returns the DNS message of an OPEN payload of KindDNS; only its minimum length is checked (RFC 1035, section 4.1.1).
func ParseDNS(p []byte) ([]byte, error) {
	d := decoder{p: p}
	d.kind(KindDNS)
	if d.err == nil && len(d.p) < 12 {
		d.fail("DNS message of %d bytes", len(d.p))
	}
	return d.p, d.err
}

// AppendControl appends an OPEN payload of KindControl.
func AppendControl(b []byte, h ControlHeader) []byte { return appendMethod(b, KindControl, h) }

// AppendWatch appends an OPEN payload of KindWatch.
func AppendWatch(b []byte, h ControlHeader) []byte { return appendMethod(b, KindWatch, h) }

func appendMethod(b []byte, k Kind, h ControlHeader) []byte {
	return append(appendString(append(b, byte(k)), h.Method), h.Body...)
}

// ParseControl reads an OPEN payload of KindControl or KindWatch. Body is a part of p and is not checked to be JSON.
func ParseControl(p []byte) (ControlHeader, error) {
	d := decoder{p: p}
	d.kind(KindControl, KindWatch)
	h := ControlHeader{Method: d.string(MaxMethod)}
	if d.err == nil && h.Method == "" {
		d.fail("control without method")
	}
	if d.err != nil {
		return ControlHeader{}, d.err
	}
	if len(d.p) > 0 {
		h.Body = d.p
	}
	return h, nil
}

// AppendHello appends an OPEN payload of KindHello.
func AppendHello(b []byte, h Hello) ([]byte, error) {
	j, err := json.Marshal(h)
	if err != nil {
		return b, fmt.Errorf("encode hello: %w", err)
	}
	return append(append(b, byte(KindHello)), j...), nil
}

// ParseHello reads an OPEN payload of KindHello. Unknown fields are ignored, so that later versions may add some.
func ParseHello(p []byte) (Hello, error) {
	d := decoder{p: p}
	d.kind(KindHello)
	if d.err != nil {
		return Hello{}, d.err
	}
	var h Hello
	if err := json.Unmarshal(d.p, &h); err != nil {
		return Hello{}, violation("hello: %v", err)
	}
	return h, nil
}

// appendAddrPort appends an address as its length (0, 4 or 16), its bytes and, if any, the port. Zones do not cross the
// tunnel (they mean nothing on another machine) and IPv4 addresses mapped into IPv6 travel as IPv4.
func appendAddrPort(b []byte, ap netip.AddrPort) []byte {
	if !ap.IsValid() {
		return append(b, 0)
	}
	a := ap.Addr().Unmap().WithZone("")
	s := a.AsSlice()
	b = append(append(b, byte(len(s))), s...)
	return binary.BigEndian.AppendUint16(b, ap.Port())
}

func appendString(b []byte, s string) []byte {
	return append(binary.AppendUvarint(b, uint64(len(s))), s...)
}

// decoder reads the parts of a header; the first error stays.
type decoder struct {
	p   []byte
	err error
}

func (d *decoder) fail(format string, args ...any) {
	if d.err == nil {
		d.err = violation(format, args...)
	}
}

func (d *decoder) take(n int) []byte {
	if d.err != nil || len(d.p) < n {
		d.fail("header too short")
		return nil
	}
	b := d.p[:n]
	d.p = d.p[n:]
	return b
}

func (d *decoder) byte() byte {
	if b := d.take(1); b != nil {
		return b[0]
	}
	return 0
}

func (d *decoder) uint16() uint16 {
	if b := d.take(2); b != nil {
		return binary.BigEndian.Uint16(b)
	}
	return 0
}

func (d *decoder) kind(want ...Kind) {
	k := Kind(d.byte())
	for _, w := range want {
		if k == w {
			return
		}
	}
	d.fail("header of %s", k)
}

func (d *decoder) string(limit int) string {
	n, size := binary.Uvarint(d.p)
	switch {
	case d.err != nil:
		return ""
	case size <= 0 || n > uint64(limit) || size != len(binary.AppendUvarint(nil, n)):
		d.fail("string length")
		return ""
	}
	d.p = d.p[size:]
	s := string(d.take(int(n)))
	if !utf8.ValidString(s) {
		d.fail("string is not UTF-8")
	}
	return s
}

func (d *decoder) addrPort() netip.AddrPort {
	n := d.byte()
	switch n {
	case 0:
		return netip.AddrPort{}
	case 4, 16:
	default:
		d.fail("address of %d bytes", n)
		return netip.AddrPort{}
	}
	a, ok := netip.AddrFromSlice(d.take(int(n)))
	if !ok || a.Is4In6() {
		d.fail("address not in its shortest form")
		return netip.AddrPort{}
	}
	return netip.AddrPortFrom(a, d.uint16())
}

// end reports the first error, or bytes that are left over.
func (d *decoder) end() error {
	if d.err == nil && len(d.p) > 0 {
		d.fail("%d bytes after the header", len(d.p))
	}
	return d.err
}
