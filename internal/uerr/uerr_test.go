package uerr

import (
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"testing"
)

func TestExitCodes(t *testing.T) {
	for k, want := range map[Kind]int{
		Internal: 1, Usage: 2, Denied: 3, NotConnected: 4, Cluster: 5, NotFound: 1, Conflict: 1, Canceled: 130, "from another version": 1,
	} {
		if got := k.ExitCode(); got != want {
			t.Errorf("%s: %d, want %d", k, got, want)
		}
	}
}

func TestError(t *testing.T) {
	cause := &fs.PathError{Op: "open", Path: "x", Err: fs.ErrNotExist}
	inner := New(Denied, "ask for the right", "cannot create %s", "sessions")
	for name, tt := range map[string]struct {
		err        *Error
		kind       Kind
		text, hint string
		is         error
	}{
		"new":                       {New(Usage, "like this", "port %d", 0), Usage, "port 0", "like this", nil},
		"around an error":           {Wrap(cause, Cluster, "look", "connect"), Cluster, "connect: open x: file does not exist", "look", fs.ErrNotExist},
		"around one of ours":        {Wrap(inner, Cluster, "look", "connect"), Denied, "connect: cannot create sessions", "ask for the right", inner},
		"around one of ours, deep":  {Wrap(fmt.Errorf("dial: %w", inner), Cluster, "look", "connect"), Denied, "connect: dial: cannot create sessions", "ask for the right", inner},
		"around one without a hint": {Wrap(New(Denied, "", "no"), Cluster, "look", "connect"), Denied, "connect: no", "look", nil},
		"without words":             {&Error{Kind: Cluster, Err: cause}, Cluster, "open x: file does not exist", "", fs.ErrNotExist},
		"from anything":             {From(cause), Internal, "open x: file does not exist", "", nil},
		"from one of ours, wrapped": {From(fmt.Errorf("join: %w", inner)), Denied, "join: cannot create sessions", "ask for the right", nil},
	} {
		t.Run(name, func(t *testing.T) {
			if tt.err.Kind != tt.kind || tt.err.Error() != tt.text || tt.err.Hint != tt.hint {
				t.Errorf("%s %q %q, want %s %q %q", tt.err.Kind, tt.err.Error(), tt.err.Hint, tt.kind, tt.text, tt.hint)
			}
			if tt.is != nil && !errors.Is(tt.err, tt.is) {
				t.Errorf("is not %v", tt.is)
			}
		})
	}
	if From(nil) != nil {
		t.Error("no error is an error")
	}
}

// What crosses the local API is what was there, in words.
func TestJSON(t *testing.T) {
	b, err := json.Marshal(From(Wrap(errors.New("EOF"), Cluster, "look", "connect")))
	if err != nil || string(b) != `{"kind":"cluster","error":"connect: EOF","hint":"look"}` {
		t.Fatalf("%s, %v", b, err)
	}
	var e Error
	if err := json.Unmarshal(b, &e); err != nil || e.Error() != "connect: EOF" || e.Kind != Cluster || e.Hint != "look" {
		t.Errorf("%+v, %v", e, err)
	}
}
