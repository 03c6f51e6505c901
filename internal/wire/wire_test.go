package wire

import (
	"bufio"
	"bytes"
	"context"
	"encoding/hex"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"net"
	"net/netip"
	"os"
	"strings"
	"syscall"
	"testing"
	"unicode/utf8"

	"github.com/google/go-cmp/cmp"
	"github.com/google/go-cmp/cmp/cmpopts"
)

var update = flag.Bool("update", false, "rewrite testdata/vectors.txt")

var (
	v4  = netip.MustParseAddrPort("10.1.2.3:8080")
	v6  = netip.MustParseAddrPort("[2001:db8::1]:53")
	eqA = cmpopts.EquateComparable(netip.AddrPort{})
)

// vectors are the examples that docs/protocol.md refers to; testdata/vectors.txt holds their bytes.
func vectors() []struct {
	name string
	b    []byte
} {
	frame := func(h Header, payload ...byte) []byte {
		h.Len = len(payload)
		return append(h.Append(nil), payload...)
	}
	hello, err := AppendHello(nil, Hello{Version: 1, Product: "doppel/0.1.0", Role: RoleLaptop, Session: "6f1c"})
	if err != nil {
		panic(err)
	}
	reply, err := MarshalHelloReply(HelloReply{Version: 1, Manager: "traffic-manager-0", Info: json.RawMessage(`{"a":1}`)})
	if err != nil {
		panic(err)
	}
	again, err := AppendHello(nil, Hello{Version: 1, Role: RoleLaptop, Session: "6f1c", Resume: &Resume{Mux: "k3", Received: 70000}})
	if err != nil {
		panic(err)
	}
	resumed, err := MarshalHelloReply(HelloReply{Version: 1, Session: "6f1c", Resume: &Resume{Mux: "k3", Received: 1 << 33, Seconds: 30}})
	if err != nil {
		panic(err)
	}
	return []struct {
		name string
		b    []byte
	}{
		{"frame OPEN stream 1, 256 KiB of credit", frame(Header{Type: TypeOpen, Flags: 18, Stream: 1}, AppendTCP(nil, FlowHeader{Src: v4, Dst: v4})...)},
		{"frame OPEN stream 3, a call, 64 KiB of credit", frame(Header{Type: TypeOpen, Flags: FlagFin | 16, Stream: 3}, AppendControl(nil, ControlHeader{"ping", nil})...)},
		{"frame OK stream 1, 4 KiB of credit", frame(Header{Type: TypeOK, Flags: 12, Stream: 1})},
		{"frame OK stream 3, the whole answer", frame(Header{Type: TypeOK, Flags: FlagFin, Stream: 3}, []byte("pong")...)},
		{"frame ERR stream 5", AppendError(nil, TypeErr, 5, CodeRefused, "connection refused")},
		{"frame DATA stream 1", frame(Header{Type: TypeData, Stream: 1}, []byte("hello")...)},
		{"frame DATA stream 7, an empty message", frame(Header{Type: TypeData, Flags: FlagMessage, Stream: 7})},
		{"frame FIN stream 1", frame(Header{Type: TypeFin, Stream: 1})},
		{"frame RST stream 2", AppendRst(nil, 2, CodeReset)},
		{"frame WINDOW stream 1, 65536 bytes", AppendUint32(nil, TypeWindow, 1, 65536)},
		{"frame WANT stream 1, 9008 bytes", AppendUint32(nil, TypeWant, 1, 9008)},
		{"frame RECLAIM stream 1, keep 4096", AppendUint32(nil, TypeReclaim, 1, 4096)},
		{"frame RETURN stream 1, 61440 bytes", AppendUint32(nil, TypeReturn, 1, 61440)},
		{"frame PING", frame(Header{Type: TypePing}, 0, 0, 0, 0, 0, 0, 0, 1)},
		{"frame PONG", frame(Header{Type: TypePong}, 0, 0, 0, 0, 0, 0, 0, 1)},
		{"frame GOAWAY", AppendError(nil, TypeGoAway, 0, CodeGone, "session deleted")},
		{"frame ACK, 1 GiB received", AppendAck(nil, 1<<30)},
		{"header hello", hello},
		{"header hello, to resume", again},
		{"answer hello", reply},
		{"answer hello, resumed", resumed},
		{"header tcp", AppendTCP(nil, FlowHeader{Src: v4, Dst: v6})},
		{"header udp, no source", AppendUDP(nil, FlowHeader{Dst: v6})},
		{"header dns", AppendDNS(nil, []byte("\x12\x34\x01\x00\x00\x01\x00\x00\x00\x00\x00\x00\x01a\x00\x00\x01\x00\x01"))},
		{"header control", AppendControl(nil, ControlHeader{"session.get", []byte(`{"uid":"6f1c"}`)})},
		{"header watch", AppendWatch(nil, ControlHeader{"services", nil})},
		{"header echo", AppendEcho(nil, v4.Addr(), v6.Addr())},
		{"message echo", AppendEchoMessage(nil, 7, []byte("ping"))},
		{"header intercept", AppendIntercept(nil, InterceptHeader{Intercept: "7a0e", Proto: ProtoTCP, Src: v4, Dst: v6, Port: 8080})},
		{"header files", AppendFiles(nil, "7a0e")},
		{"header preview", AppendPreview(nil, PreviewHeader{ID: "k7d2"})},
		{"header preview, HTTP/2", AppendPreview(nil, PreviewHeader{"k7d2", true})},
	}
}

func TestVectors(t *testing.T) {
	const file = "testdata/vectors.txt"
	if *update {
		var out bytes.Buffer
		out.WriteString("# Bytes of docs/protocol.md's examples: name = hex. Written by go test -update.\n")
		for _, v := range vectors() {
			fmt.Fprintf(&out, "%s = %x\n", v.name, v.b)
		}
		if err := os.WriteFile(file, out.Bytes(), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	f, err := os.Open(file)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	want := map[string]string{}
	for sc := bufio.NewScanner(f); sc.Scan(); {
		if name, hexa, ok := strings.Cut(sc.Text(), " = "); ok && name[0] != '#' {
			want[name] = hexa
		}
	}
	for _, v := range vectors() {
		if got := hex.EncodeToString(v.b); got != want[v.name] {
			t.Errorf("%s:\n got %s\nwant %s", v.name, got, want[v.name])
		}
		if strings.HasPrefix(v.name, "frame ") {
			h, err := ParseHeader(v.b)
			if err != nil || h.Len != len(v.b)-HeaderLen {
				t.Errorf("%s: %+v, %v", v.name, h, err)
			}
		}
	}
	if len(want) != len(vectors()) {
		t.Errorf("%d vectors in the file, %d here", len(want), len(vectors()))
	}
}

func TestHeadersRoundTrip(t *testing.T) {
	for _, h := range []FlowHeader{{v4, v6}, {netip.AddrPort{}, v4}, {v6, v6}} {
		for _, b := range [][]byte{AppendTCP(nil, h), AppendUDP(nil, h)} {
			got, err := ParseFlow(b)
			if diff := cmp.Diff(h, got, eqA); diff != "" || err != nil {
				t.Error(diff, err)
			}
		}
	}
	mapped := FlowHeader{Dst: netip.MustParseAddrPort("[::ffff:10.1.2.3]:8080")}
	if got, err := ParseFlow(AppendTCP(nil, mapped)); err != nil || got.Dst != v4 {
		t.Error(got, err)
	}
	if got, err := ParseFlow(AppendEcho(nil, v4.Addr(), v6.Addr())); err != nil || got.Src.Addr() != v4.Addr() || got.Dst.Addr() != v6.Addr() {
		t.Error(got, err)
	}
	if seq, data, err := ParseEchoMessage(AppendEchoMessage(nil, 9, []byte("x"))); err != nil || seq != 9 || string(data) != "x" {
		t.Error(seq, data, err)
	}
	zone := FlowHeader{Dst: netip.MustParseAddrPort("[fe80::1%eth0]:1")}
	if got, err := ParseFlow(AppendTCP(nil, zone)); err != nil || got.Dst.Addr().Zone() != "" {
		t.Error(got, err)
	}
	i := InterceptHeader{Intercept: "uid", Proto: ProtoUDP, Src: v4, Dst: v6, Port: 1}
	if got, err := ParseIntercept(AppendIntercept(nil, i)); err != nil || cmp.Diff(i, got, eqA) != "" {
		t.Error(got, err)
	}
	if uid, err := ParseFiles(AppendFiles(nil, "uid")); err != nil || uid != "uid" {
		t.Error(uid, err)
	}
	for _, want := range []PreviewHeader{{"id", false}, {"id", true}} {
		if got, err := ParsePreview(AppendPreview(nil, want)); err != nil || got != want {
			t.Error(got, err)
		}
	}
	c := ControlHeader{"m", []byte("{}")}
	for _, b := range [][]byte{AppendControl(nil, c), AppendWatch(nil, c)} {
		if got, err := ParseControl(b); err != nil || cmp.Diff(c, got) != "" {
			t.Error(got, err)
		}
	}
	hello := Hello{Version: 1, Role: RoleAgent, Token: "t", Pod: "p", Namespace: "n", Workload: "deployment/w"}
	b, err := AppendHello(nil, hello)
	if err != nil {
		t.Fatal(err)
	}
	if got, err := ParseHello(b); err != nil || got != hello {
		t.Error(got, err)
	}
}

func TestMalformedHeaders(t *testing.T) {
	flow := AppendTCP(nil, FlowHeader{v4, v6})
	long := strings.Repeat("x", MaxMethod+1)
	parse := map[string]func([]byte) error{
		"flow":         func(b []byte) error { _, err := ParseFlow(b); return err },
		"intercept":    func(b []byte) error { _, err := ParseIntercept(b); return err },
		"echo message": func(b []byte) error { _, _, err := ParseEchoMessage(b); return err },
		"files":        func(b []byte) error { _, err := ParseFiles(b); return err },
		"preview":      func(b []byte) error { _, err := ParsePreview(b); return err },
		"control":      func(b []byte) error { _, err := ParseControl(b); return err },
		"dns":          func(b []byte) error { _, err := ParseDNS(b); return err },
		"hello":        func(b []byte) error { _, err := ParseHello(b); return err },
	}
	for _, tt := range []struct {
		parser, name string
		b            []byte
	}{
		{"flow", "empty", nil},
		{"flow", "kind only", flow[:1]},
		{"flow", "cut", flow[:len(flow)-1]},
		{"flow", "long", append(bytes.Clone(flow), 0)},
		{"flow", "other kind", AppendDNS(nil, make([]byte, 12))},
		{"flow", "address of 5 bytes", []byte{2, 5, 1, 2, 3, 4, 5, 0, 1}},
		{"flow", "no destination", AppendTCP(nil, FlowHeader{Src: v4})},
		{"flow", "mapped", append([]byte{2, 0, 16, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0xff, 0xff, 1, 2, 3, 4}, 0, 1)},
		{"flow", "echo with a port", append([]byte{byte(KindEcho)}, flow[1:]...)},
		{"echo message", "too short", []byte{1}},
		{"intercept", "protocol 1", AppendIntercept(nil, InterceptHeader{Intercept: "u", Proto: 1})},
		{"intercept", "no UID", AppendIntercept(nil, InterceptHeader{Proto: 6})},
		{"intercept", "long UID", AppendIntercept(nil, InterceptHeader{Intercept: long, Proto: 6})},
		{"files", "no UID", AppendFiles(nil, "")},
		{"preview", "no ID", AppendPreview(nil, PreviewHeader{})},
		{"preview", "HTTP/3", append(AppendPreview(nil, PreviewHeader{ID: "u"}), 3)},
		{"preview", "long", append(AppendPreview(nil, PreviewHeader{"u", true}), 2)},
		{"files", "long", append(AppendFiles(nil, "u"), 0)},
		{"control", "no method", AppendControl(nil, ControlHeader{})},
		{"control", "long method", AppendControl(nil, ControlHeader{Method: long})},
		{"control", "method not UTF-8", AppendControl(nil, ControlHeader{Method: "\xff"})},
		{"control", "length not shortest", []byte{5, 0x81, 0, 'm'}},
		{"control", "length endless", []byte{5, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff}},
		{"dns", "11 bytes", AppendDNS(nil, make([]byte, 11))},
		{"hello", "not JSON", []byte{1, '{'}},
		{"hello", "empty", nil},
	} {
		if err := parse[tt.parser](tt.b); !errors.Is(err, ErrProtocol) {
			t.Errorf("%s, %s: %v", tt.parser, tt.name, err)
		}
	}
}

func TestErrorText(t *testing.T) {
	long := strings.Repeat("é", MaxMessage)
	b := AppendError(nil, TypeErr, 1, CodeBusy, long)
	if _, err := ParseHeader(b); err != nil {
		t.Error(err)
	}
	code, msg, err := ParseError(b[HeaderLen:])
	if code != CodeBusy || err != nil || !utf8.ValidString(msg) || !strings.HasPrefix(long, msg) || len(msg) < MaxMessage-4 {
		t.Errorf("%s %q %v", code, msg, err)
	}
	if _, msg, _ = ParseError([]byte{0, 1, 0xff, 'a'}); msg != "\uFFFDa" {
		t.Errorf("%q", msg)
	}
}

func TestCodes(t *testing.T) {
	dial := func(err error) error {
		return &net.OpError{Op: "dial", Err: os.NewSyscallError("connect", err)}
	}
	for _, tt := range []struct {
		err  error
		want Code
	}{
		{nil, CodeNone},
		{dial(syscall.ECONNREFUSED), CodeRefused},
		{dial(syscall.EHOSTUNREACH), CodeUnreachable},
		{dial(syscall.ENETUNREACH), CodeUnreachable},
		{dial(syscall.ETIMEDOUT), CodeTimeout},
		{dial(syscall.ECONNRESET), CodeReset},
		{dial(syscall.EACCES), CodeDenied},
		{&net.OpError{Op: "dial", Err: os.ErrDeadlineExceeded}, CodeTimeout},
		{context.DeadlineExceeded, CodeTimeout},
		{context.Canceled, CodeCanceled},
		{&net.DNSError{IsNotFound: true}, CodeNotFound},
		{errors.New("else"), CodeInternal},
	} {
		if got := CodeOf(tt.err); got != tt.want {
			t.Errorf("%v: %s, want %s", tt.err, got, tt.want)
		}
	}
	for c := CodeNone; c <= CodeCanceled; c++ {
		if strings.Contains(c.String(), "(") {
			t.Errorf("code %d has no name", c)
		}
		if n := c.Errno(); n != 0 && CodeOf(n) != c {
			t.Errorf("%s becomes %s", c, CodeOf(n))
		}
	}
	if Code(99).String() != "code(99)" || Type(99).String() != "type(99)" || Kind(99).String() != "kind(99)" {
		t.Error("names of unknown values")
	}
}

// TestProtocolDoc: docs/protocol.md names every type, kind and code by its number.
func TestProtocolDoc(t *testing.T) {
	doc, err := os.ReadFile("../../docs/protocol.md")
	if err != nil {
		t.Fatal(err)
	}
	row := func(n int, name string) {
		if !strings.Contains(string(doc), fmt.Sprintf("\n| %d | %s |", n, name)) {
			t.Errorf("docs/protocol.md has no row for %d %s", n, name)
		}
	}
	for i := TypeOpen; i <= TypeGoAway; i++ {
		row(int(i), i.String())
	}
	for k := KindHello; k <= KindPreview; k++ {
		row(int(k), k.String())
	}
	for c := CodeNone; c <= CodeCanceled; c++ {
		row(int(c), c.String())
	}
	if !strings.Contains(string(doc), strings.TrimSpace(Preface)) {
		t.Error("docs/protocol.md has another preface")
	}
}
