package web

import (
	"net/http"
	"net/http/httptest"
	"strings"
	"testing"
	"time"
)

// deadlines remembers what is set.
type deadlines struct {
	*httptest.ResponseRecorder
	read time.Time
}

func (d *deadlines) SetReadDeadline(t time.Time) error { d.read = t; return nil }

// A body has to come within a time; what has none may be open for as long as it likes.
func TestBodyTimeout(t *testing.T) {
	h := headers(http.HandlerFunc(func(http.ResponseWriter, *http.Request) {}))
	for body, want := range map[string]bool{"": false, "x": true} {
		d := &deadlines{ResponseRecorder: httptest.NewRecorder()}
		h.ServeHTTP(d, httptest.NewRequest(http.MethodPost, "/", strings.NewReader(body)))
		if d.read.IsZero() == want {
			t.Errorf("%q: %v", body, d.read)
		}
	}
}
