package tunnel

import (
	"bytes"
	"errors"
	"io"
	"math/rand/v2"
	"testing"
	"testing/iotest"
)

// What is read is what was sent, whatever the sizes, and a quiet connection gives the large buffer back.
func TestAhead(t *testing.T) {
	sent := make([]byte, 3<<20)
	for i := range sent {
		sent[i] = byte(rand.Uint32())
	}
	for name, from := range map[string]io.Reader{
		"all at once":    bytes.NewReader(sent),
		"half of it":     iotest.HalfReader(bytes.NewReader(sent)),
		"and its end":    iotest.DataErrReader(bytes.NewReader(sent)),
		"a byte":         iotest.OneByteReader(bytes.NewReader(sent[:10_000])),
		"much, then few": io.MultiReader(bytes.NewReader(sent[:200_000]), iotest.OneByteReader(bytes.NewReader(sent[200_000:201_000]))),
	} {
		a := newAhead(from)
		largest := 0
		var got []byte
		for p := make([]byte, 1500); ; {
			n, err := a.Read(p[:1+rand.IntN(len(p))])
			got, largest = append(got, p[:n]...), max(largest, len(a.buf))
			if errors.Is(err, io.EOF) {
				break
			}
			if err != nil {
				t.Fatalf("%s: %v", name, err)
			}
		}
		if !bytes.Equal(got, sent[:len(got)]) || len(got) < 10_000 && name != "a byte" {
			t.Errorf("%s: %d bytes, not the same", name, len(got))
		}
		switch name {
		case "a byte":
			if largest != readLittle {
				t.Errorf("%s: a buffer of %d bytes", name, largest)
			}
		case "much, then few":
			if largest != readAhead || len(a.buf) != readLittle {
				t.Errorf("%s: a buffer of %d bytes, at last %d", name, largest, len(a.buf))
			}
		case "all at once":
			if largest != readAhead || len(got) != len(sent) {
				t.Errorf("%s: a buffer of %d bytes, %d read", name, largest, len(got))
			}
		}
	}
}
