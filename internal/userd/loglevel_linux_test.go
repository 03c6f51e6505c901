package userd

import (
	"bytes"
	"fmt"
	"log/slog"
	"net"
	"path/filepath"
	"slices"
	"testing"
	"time"

	"github.com/doppel-dev/doppel/internal/buildinfo"
	"github.com/doppel-dev/doppel/internal/localapi"
	"github.com/doppel-dev/doppel/internal/rootapi"
	"github.com/doppel-dev/doppel/internal/xlog"
)

// Both daemons go back to the level that connect gave them, and no change for a time is without an end.
func TestLogLevel(t *testing.T) {
	t.Setenv(xlog.EnvLevel, "")
	path := filepath.Join(t.TempDir(), "rootd.sock")
	l, err := net.Listen("unixpacket", path)
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	asked := make(chan string, 1)
	go func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			buf := make([]byte, rootapi.MaxPacket)
			for {
				n, err := c.Read(buf)
				if err != nil {
					break
				}
				m, err := rootapi.Decode(buf[:n])
				if err != nil {
					break
				}
				if m.Op == rootapi.OpLogLevel {
					asked <- fmt.Sprintf("%s %d", m.Level, m.Seconds)
				}
				b, err := rootapi.Message{ID: m.ID, Op: rootapi.OpReply, Version: &rootapi.Version{Program: buildinfo.String(), Protocol: rootapi.Protocol}}.Encode()
				if err != nil {
					break
				}
				_, _ = c.Write(b)
			}
			_ = c.Close()
		}
	}()
	log, level := xlog.New(&bytes.Buffer{}, "doppel")
	d := &Daemon{cfg: Config{Level: level, Log: log, RootSocket: func() string { return path }}}
	var got []string
	for _, step := range []struct {
		req  localapi.LogLevelRequest
		want slog.Level
	}{
		{localapi.LogLevelRequest{For: time.Minute}, slog.LevelInfo}, // reset, and nobody gave one
		{localapi.LogLevelRequest{Level: "warn", Start: true}, slog.LevelWarn},
		{localapi.LogLevelRequest{Level: "debug", For: 500 * time.Millisecond}, slog.LevelDebug},
		{localapi.LogLevelRequest{For: time.Minute}, slog.LevelWarn},
		{localapi.LogLevelRequest{Level: "error"}, slog.LevelError},
		{localapi.LogLevelRequest{}, slog.LevelWarn},
	} {
		if _, err := d.logLevel(t.Context(), step.req, nil); err != nil {
			t.Fatal(err)
		}
		if level.Level() != step.want {
			t.Errorf("%+v: %v", step.req, level.Level())
		}
		got = append(got, <-asked)
	}
	if want := []string{" 0", "warn 0", "debug 1", "warn 0", "error 0", "warn 0"}; !slices.Equal(got, want) {
		t.Errorf("the root daemon was asked %q, not %q", got, want)
	}
}
