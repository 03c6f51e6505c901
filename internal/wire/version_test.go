package wire

import (
	"bufio"
	"bytes"
	"encoding/hex"
	"encoding/json"
	"fmt"
	"net/netip"
	"os"
	"reflect"
	"strings"
	"testing"
)

// said is a frame as it is understood.
type said struct {
	Header
	payload any
}

// understand reads a line of testdata/version1.txt as the other end does.
func understand(t *testing.T, name string, b []byte) any {
	t.Helper()
	if !strings.HasPrefix(name, "frame ") {
		if strings.HasPrefix(name, "answer ") {
			return must(ParseHelloReply(b))(t)
		}
		if strings.HasPrefix(name, "message ") {
			seq, data, err := ParseEchoMessage(b)
			return fmt.Sprint(seq, " ", string(must(data, err)(t)))
		}
		return opened(t, b)
	}
	h := must(ParseHeader(b))(t)
	s := said{Header: h}
	if len(b) != HeaderLen+h.Len {
		t.Fatalf("%d bytes, the header says %d", len(b), h.Len)
	}
	p := b[HeaderLen:]
	switch h.Type {
	case TypeOpen:
		s.payload = opened(t, p)
	case TypeErr, TypeGoAway:
		code, text, err := ParseError(p)
		s.payload = fmt.Sprint(must(code, err)(t), ": ", text)
	case TypeWindow, TypeWant, TypeReclaim, TypeReturn:
		s.payload = must(ParseUint32(p))(t)
	case TypeRst:
		s.payload = must(ParseRst(p))(t)
	case TypeAck:
		s.payload = must(ParseAck(p))(t)
	case TypeOK, TypeData, TypeFin, TypePing, TypePong:
		s.payload = string(p)
	}
	return s
}

// opened reads the header of a stream.
func opened(t *testing.T, p []byte) any {
	t.Helper()
	switch must(KindOf(p))(t) {
	case KindHello:
		return must(ParseHello(p))(t)
	case KindTCP, KindUDP, KindEcho:
		return must(ParseFlow(p))(t)
	case KindDNS:
		return must(ParseDNS(p))(t)
	case KindControl, KindWatch:
		return must(ParseControl(p))(t)
	case KindIntercept:
		return must(ParseIntercept(p))(t)
	case KindFiles:
		return must(ParseFiles(p))(t)
	case KindPreview:
		return must(ParsePreview(p))(t)
	}
	t.Fatalf("kind %d", p[0])
	return nil
}

func must[T any](v T, err error) func(*testing.T) T {
	return func(t *testing.T) T {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
		return v
	}
}

// TestVersion1 understands what the first programs of version 1 said. The other vectors follow the code; these follow nobody: programs of then and of now
// meet in the same clusters.
func TestVersion1(t *testing.T) {
	frame := func(typ Type, flags uint8, stream uint32, length int, payload any) said {
		return said{Header{Type: typ, Flags: flags, Len: length, Stream: stream}, payload}
	}
	mapped := netip.AddrPortFrom(v6.Addr(), 0)
	meant := map[string]any{
		"frame OPEN stream 1, 256 KiB of credit":        frame(TypeOpen, 18, 1, 15, FlowHeader{v4, v4}),
		"frame OPEN stream 3, a call, 64 KiB of credit": frame(TypeOpen, FlagFin|16, 3, 6, ControlHeader{"ping", nil}),
		"frame OK stream 1, 4 KiB of credit":            frame(TypeOK, 12, 1, 0, ""),
		"frame OK stream 3, the whole answer":           frame(TypeOK, FlagFin, 3, 4, "pong"),
		"frame ERR stream 5":                            frame(TypeErr, 0, 5, 20, "refused: connection refused"),
		"frame DATA stream 1":                           frame(TypeData, 0, 1, 5, "hello"),
		"frame DATA stream 7, an empty message":         frame(TypeData, FlagMessage, 7, 0, ""),
		"frame FIN stream 1":                            frame(TypeFin, 0, 1, 0, ""),
		"frame RST stream 2":                            frame(TypeRst, 0, 2, 2, CodeReset),
		"frame WINDOW stream 1, 65536 bytes":            frame(TypeWindow, 0, 1, 4, uint32(65536)),
		"frame WANT stream 1, 9008 bytes":               frame(TypeWant, 0, 1, 4, uint32(9008)),
		"frame RECLAIM stream 1, keep 4096":             frame(TypeReclaim, 0, 1, 4, uint32(4096)),
		"frame RETURN stream 1, 61440 bytes":            frame(TypeReturn, 0, 1, 4, uint32(61440)),
		"frame PING":                                    frame(TypePing, 0, 0, 8, "\x00\x00\x00\x00\x00\x00\x00\x01"),
		"frame PONG":                                    frame(TypePong, 0, 0, 8, "\x00\x00\x00\x00\x00\x00\x00\x01"),
		"frame GOAWAY":                                  frame(TypeGoAway, 0, 0, 17, "gone: session deleted"),
		"frame ACK, 1 GiB received":                     frame(TypeAck, 0, 0, 8, uint64(1<<30)),
		"header hello":                                  Hello{Version: 1, Product: "doppel/0.1.0", Role: "laptop", Session: "6f1c"},
		"header hello, to resume":                       Hello{Version: 1, Role: "laptop", Session: "6f1c", Resume: &Resume{Mux: "k3", Received: 70000}},
		"answer hello":                                  HelloReply{Version: 1, Manager: "traffic-manager-0", Info: json.RawMessage(`{"a":1}`)},
		"answer hello, resumed":                         HelloReply{Version: 1, Session: "6f1c", Resume: &Resume{Mux: "k3", Received: 1 << 33, Seconds: 30}},
		"header tcp":                                    FlowHeader{v4, v6},
		"header udp, no source":                         FlowHeader{Dst: v6},
		"header dns":                                    []byte("\x12\x34\x01\x00\x00\x01\x00\x00\x00\x00\x00\x00\x01a\x00\x00\x01\x00\x01"),
		"header control":                                ControlHeader{"session.get", []byte(`{"uid":"6f1c"}`)},
		"header watch":                                  ControlHeader{"services", nil},
		"header echo":                                   FlowHeader{netip.AddrPortFrom(v4.Addr(), 0), mapped},
		"message echo":                                  "7 ping",
		"header intercept":                              InterceptHeader{Intercept: "7a0e", Proto: ProtoTCP, Src: v4, Dst: v6, Port: 8080},
		"header files":                                  "7a0e",
		"header preview":                                PreviewHeader{ID: "k7d2"},
	}
	text, err := os.ReadFile("testdata/version1.txt")
	if err != nil {
		t.Fatal(err)
	}
	for sc := bufio.NewScanner(bytes.NewReader(text)); sc.Scan(); {
		name, hexa, ok := strings.Cut(sc.Text(), " = ")
		if !ok || name[0] == '#' {
			continue
		}
		b, err := hex.DecodeString(hexa)
		if err != nil {
			t.Fatal(err)
		}
		if got := understand(t, name, b); !reflect.DeepEqual(got, meant[name]) {
			t.Errorf("%s:\n got %+v\nwant %+v", name, got, meant[name])
		}
		delete(meant, name)
	}
	for name := range meant {
		t.Errorf("%s is not in the file any more", name)
	}
}

// TestLater is given what a later program of the same version may say.
func TestLater(t *testing.T) {
	hello, err := ParseHello([]byte("\x01" + `{"version":1,"role":"laptop","session":"6f1c","later":{"more":1},"resume":{"mux":"k3","later":2}}`))
	if err != nil || hello.Session != "6f1c" || hello.Resume == nil || hello.Resume.Mux != "k3" {
		t.Errorf("%+v, %v", hello, err)
	}
	reply, err := ParseHelloReply([]byte(`{"version":1,"session":"6f1c","later":[1],"info":{"later":1}}`))
	if err != nil || reply.Session != "6f1c" {
		t.Errorf("%+v, %v", reply, err)
	}
	if k, err := KindOf([]byte{200, 1, 2}); err != nil || k != 200 { // refused by whoever serves the stream, which goes on
		t.Errorf("%v, %v", k, err)
	}
	if c := Code(200); c.Errno() != 0 {
		t.Errorf("code 200 is %v", c.Errno())
	}
}
