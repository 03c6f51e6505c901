package cli

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"unicode"

	"github.com/doppel-dev/doppel/internal/config"
	"github.com/doppel-dev/doppel/internal/localapi"
	"github.com/doppel-dev/doppel/internal/uerr"
	"github.com/doppel-dev/doppel/internal/xlog"
)

// On a terminal progress is one live line, gone before the answer; in a pipe every step is a line.
func TestProgress(t *testing.T) {
	for terminal, want := range map[bool]string{
		true:  "\r\x1b[Kone\r\x1b[Ktwo\r\x1b[K",
		false: "one\ntwo\n",
	} {
		var out, errOut bytes.Buffer
		a := &app{Streams: Streams{Out: &out, Err: &errOut, Terminal: terminal}}
		show, done := a.progress()
		show("one")
		show("two")
		done()
		if errOut.String() != want || out.Len() != 0 {
			t.Errorf("terminal %v: %q, stdout %q", terminal, errOut.String(), out.String())
		}
	}
}

// What pods and others say does nothing to the terminal.
func TestHarmless(t *testing.T) {
	const said = "web\x1b]0;title\a\x1b[2J\rdoppel: all is well\u009b31m\x7f"
	var out, errOut bytes.Buffer
	a := &app{Streams: Streams{Out: &out, Err: &errOut}}
	if err := a.print(nil, func(w io.Writer) { fmt.Fprintf(w, "%s\t%s\n", said, said) }); err != nil {
		t.Fatal(err)
	}
	show, done := a.progress()
	show(said)
	done()
	a.fail(t.Context(), uerr.New(uerr.Cluster, said, "%s", said))
	for _, got := range []string{out.String(), errOut.String()} {
		if strings.ContainsFunc(got, func(r rune) bool { return unicode.IsControl(r) && r != '\n' && r != '\t' }) || !strings.Contains(got, "doppel: all is well") {
			t.Errorf("%q", got)
		}
	}
}

// Ctrl-C is told as such, whatever error it made of the call that it ended.
func TestInterrupted(t *testing.T) {
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	var out, errOut bytes.Buffer
	t.Setenv("XDG_RUNTIME_DIR", t.TempDir())
	code := run(ctx, []string{"list"}, Streams{In: strings.NewReader(""), Out: &out, Err: &errOut})
	if code != 130 || errOut.String() != "doppel: error: interrupted\n" || out.Len() != 0 {
		t.Errorf("%d, %q, stdout %q", code, errOut.String(), out.String())
	}
}

// But what an interrupt leaves behind is told.
func TestInterruptedLeftBehind(t *testing.T) {
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	var errOut bytes.Buffer
	a := &app{Streams: Streams{Out: &bytes.Buffer{}, Err: &errOut}}
	code := a.fail(ctx, uerr.New(uerr.LeftBehind, "remove it", "install; take it back: still there: Pod x"))
	if want := "doppel: error: interrupted: install; take it back: still there: Pod x\ndoppel: hint: remove it\n"; code != 130 || errOut.String() != want {
		t.Errorf("%d, %q", code, errOut.String())
	}
}

func TestFail(t *testing.T) {
	for name, tt := range map[string]struct {
		err    error
		code   int
		stderr string
	}{
		"a plain error": {errors.New("plain"), 1, "doppel: error: plain\n"},
		"ours":          {uerr.Wrap(errors.New("EOF"), uerr.Cluster, "look", "connect"), 5, "doppel: error: connect: EOF\ndoppel: hint: look\n"},
		"no daemon":     {localapi.ErrNoDaemon, 4, "doppel: error: not connected\ndoppel: hint: connect first with: doppel connect\n"},
		"two":           {errors.Join(uerr.New(uerr.Denied, "", "one"), errors.New("two")), 3, "doppel: error: one two\n"},
	} {
		t.Run(name, func(t *testing.T) {
			var errOut bytes.Buffer
			a := &app{Streams: Streams{Out: &bytes.Buffer{}, Err: &errOut}}
			if code := a.fail(t.Context(), tt.err); code != tt.code || errOut.String() != tt.stderr {
				t.Errorf("%d %q", code, errOut.String())
			}
		})
	}
}

// A log of an earlier run is kept until it has grown too large.
func TestOpenLog(t *testing.T) {
	file := filepath.Join(t.TempDir(), "log")
	for _, tt := range []struct{ before, after int64 }{{0, 4}, {10, 14}, {maxLog + 1, 4}} {
		if err := os.WriteFile(file, make([]byte, tt.before), 0o600); err != nil {
			t.Fatal(err)
		}
		f, err := openLog(file)
		if err != nil {
			t.Fatal(err)
		}
		_, _ = f.WriteString("line")
		_ = f.Close()
		if st, err := os.Stat(file); err != nil || st.Size() != tt.after || st.Mode().Perm() != 0o600 {
			t.Errorf("%d bytes before: %v, %v", tt.before, st, err)
		}
	}
}

// Every command says what it does, and shows an example or none that is wrong.
func TestCommandsAreDescribed(t *testing.T) {
	a := &app{Streams: Streams{Out: &bytes.Buffer{}, Err: &bytes.Buffer{}}}
	for _, c := range a.root().Commands() {
		if c.Short == "" || strings.HasSuffix(c.Short, ".") {
			t.Errorf("%s: %q", c.Name(), c.Short)
		}
		for line := range strings.Lines(c.Example) {
			args := strings.Fields(strings.Split(strings.TrimSpace(line), "  ")[0])
			if len(args) < 2 || args[0] != "doppel" {
				t.Errorf("%s: example %q", c.Name(), line)
				continue
			}
			found, rest, err := a.root().Find(args[1:])
			if err != nil || found.Name() != c.Name() {
				t.Errorf("%s: example %q: %v", c.Name(), line, err)
				continue
			}
			if err := found.ParseFlags(rest); err != nil {
				t.Errorf("%s: example %q: %v", c.Name(), line, err)
			}
		}
	}
}

// The environment's level wins over the configuration's, if it is one.
func TestStartLevel(t *testing.T) {
	for _, tt := range []struct{ env, config, want string }{{"", "", ""}, {"", "warn", "warn"}, {"debug", "warn", "debug"}, {"debug", "", "debug"}, {"loud", "warn", "warn"}} {
		t.Setenv(xlog.EnvLevel, tt.env)
		a := &app{config: config.Config{LogLevel: tt.config}}
		if got := a.startLevel(); got != tt.want {
			t.Errorf("%+v: %q", tt, got)
		}
	}
}
