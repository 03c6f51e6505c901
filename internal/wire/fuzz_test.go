package wire

import (
	"bytes"
	"reflect"
	"testing"
	"unicode/utf8"
)

func seed(f *testing.F) {
	for _, v := range vectors() {
		f.Add(v.b)
	}
}

func FuzzHeader(f *testing.F) {
	seed(f)
	f.Fuzz(func(t *testing.T, b []byte) {
		h, err := ParseHeader(b)
		if err != nil {
			return
		}
		if got := h.Append(nil); !bytes.Equal(got, b[:HeaderLen]) {
			t.Errorf("%x became %x", b[:HeaderLen], got)
		}
		if h.Len > MaxPayload || h.Window() > 1<<MaxWindowLog {
			t.Errorf("%+v", h)
		}
	})
}

// What a parser accepts must encode to the same bytes again: there is one form of each header.
func again(t *testing.T, in, out []byte) {
	t.Helper()
	if !bytes.Equal(in, out) {
		t.Errorf("%x became %x", in, out)
	}
}

func FuzzFlow(f *testing.F) {
	seed(f)
	f.Fuzz(func(t *testing.T, b []byte) {
		if h, err := ParseFlow(b); err == nil {
			again(t, b, appendFlow(nil, Kind(b[0]), h))
		}
	})
}

func FuzzEcho(f *testing.F) {
	seed(f)
	f.Fuzz(func(t *testing.T, b []byte) {
		if seq, data, err := ParseEchoMessage(b); err == nil {
			again(t, b, AppendEchoMessage(nil, seq, data))
		}
	})
}

func FuzzIntercept(f *testing.F) {
	seed(f)
	f.Fuzz(func(t *testing.T, b []byte) {
		if h, err := ParseIntercept(b); err == nil {
			again(t, b, AppendIntercept(nil, h))
		}
	})
}

func FuzzFiles(f *testing.F) {
	seed(f)
	f.Fuzz(func(t *testing.T, b []byte) {
		if uid, err := ParseFiles(b); err == nil {
			again(t, b, AppendFiles(nil, uid))
		}
	})
}

func FuzzPreview(f *testing.F) {
	seed(f)
	f.Fuzz(func(t *testing.T, b []byte) {
		if h, err := ParsePreview(b); err == nil {
			again(t, b, AppendPreview(nil, h))
		}
	})
}

func FuzzControl(f *testing.F) {
	seed(f)
	f.Fuzz(func(t *testing.T, b []byte) {
		if h, err := ParseControl(b); err == nil {
			again(t, b, appendMethod(nil, Kind(b[0]), h))
		}
	})
}

func FuzzDNS(f *testing.F) {
	seed(f)
	f.Fuzz(func(t *testing.T, b []byte) {
		if m, err := ParseDNS(b); err == nil {
			again(t, b, AppendDNS(nil, m))
		}
	})
}

func FuzzHello(f *testing.F) {
	seed(f)
	f.Fuzz(func(t *testing.T, b []byte) {
		h, err := ParseHello(b)
		if err != nil {
			return
		}
		enc, err := AppendHello(nil, h)
		if err != nil {
			t.Fatal(err)
		}
		if got, err := ParseHello(enc); err != nil || !reflect.DeepEqual(got, h) {
			t.Errorf("%+v became %+v, %v", h, got, err)
		}
		_, _ = ParseHelloReply(b[1:])
	})
}

func FuzzError(f *testing.F) {
	seed(f)
	f.Fuzz(func(t *testing.T, b []byte) {
		if code, msg, err := ParseError(b); err == nil {
			if !utf8.ValidString(msg) {
				t.Errorf("%q", msg)
			}
			if h, err := ParseHeader(AppendError(nil, TypeErr, 1, code, msg)); err != nil {
				t.Error(h, err)
			}
		}
		_, _ = ParseUint32(b)
		_, _ = ParseRst(b)
	})
}
