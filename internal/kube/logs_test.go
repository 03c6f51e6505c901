package kube

import (
	"bytes"
	"io"
	"testing"
	"testing/iotest"
)

// TestEnd: of a long log the end is kept, which is the time of the trouble.
func TestEnd(t *testing.T) {
	long := bytes.Repeat([]byte("0123456789"), 30_000)
	for name, row := range map[string]struct {
		limit, want int
	}{
		"short":      {1 << 20, len(long)},
		"exact":      {len(long), len(long)},
		"long":       {1000, 1000},
		"one less":   {len(long) - 1, len(long) - 1},
		"very short": {1, 1},
	} {
		for _, r := range []io.Reader{bytes.NewReader(long), iotest.DataErrReader(bytes.NewReader(long)), iotest.OneByteReader(bytes.NewReader(long))} {
			got, err := end(r, row.limit)
			if err != nil || !bytes.Equal(got, long[len(long)-row.want:]) {
				t.Errorf("%s: %d bytes, %v", name, len(got), err)
			}
		}
	}
	if got, err := end(io.MultiReader(bytes.NewReader(long), iotest.ErrReader(io.ErrUnexpectedEOF)), 10); len(got) != 10 || err == nil {
		t.Errorf("%d bytes, %v", len(got), err)
	}
}
