package userd

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net/http"
	"net/http/httptest"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/doppel-dev/doppel/internal/buildinfo"
	"github.com/doppel-dev/doppel/internal/localapi"
	"github.com/doppel-dev/doppel/internal/rootapi"
	"github.com/doppel-dev/doppel/internal/uerr"
)

// runDaemon runs a user daemon that has no root daemon; it ends with the test.
func runDaemon(t *testing.T, ctx context.Context) (*localapi.Client, Config, chan error) {
	t.Helper()
	dir := t.TempDir()
	cfg := Config{
		Socket: filepath.Join(dir, "run", "daemon.sock"), LogFile: "/log", RootSocket: func() string { return filepath.Join(dir, "rootd.sock") },
		Root: func(context.Context, rootapi.Options) (*rootapi.Client, error) {
			return nil, errors.New("no root daemon in this test")
		},
		Log: slog.New(slog.NewTextHandler(t.Output(), nil)),
	}
	d, err := New(cfg)
	if err != nil {
		t.Fatal(err)
	}
	done := make(chan error, 1)
	go func() { done <- d.Run(ctx) }()
	c := localapi.NewClient(cfg.Socket)
	for end := time.Now().Add(deadline); ; time.Sleep(2 * time.Millisecond) { // polling, not synchronisation
		if err := c.Call(ctx, localapi.MethodStatus, localapi.Empty{}, nil, nil); err == nil {
			break
		} else if time.Now().After(end) {
			t.Fatal(err)
		}
	}
	return c, cfg, done
}

func TestDaemonWithoutSession(t *testing.T) {
	ctx, cancel := context.WithCancel(t.Context())
	c, cfg, done := runDaemon(t, ctx)
	var st localapi.Status
	if err := c.Call(ctx, localapi.MethodStatus, localapi.Empty{}, &st, nil); err != nil || st.Connected || st.Version != buildinfo.Version || st.PID != os.Getpid() || st.LogFile != "/log" {
		t.Errorf("%+v, %v", st, err)
	}
	for method, req := range map[string]any{
		localapi.MethodList: localapi.ListRequest{}, localapi.MethodIntercept: localapi.InterceptRequest{Name: "web"}, localapi.MethodLeave: localapi.LeaveRequest{Name: "web"},
	} {
		wantError(t, c.Call(ctx, method, req, nil, nil), uerr.NotConnected, "not connected", "doppel connect")
	}
	wantError(t, c.Call(ctx, localapi.MethodConnect, localapi.ConnectRequest{Kubeconfig: "/nonexistent"}, nil, nil), uerr.Usage, "no kubeconfig", "KUBECONFIG")
	var stacks localapi.Stacks
	if err := c.Call(ctx, localapi.MethodStacks, localapi.StacksRequest{Collect: true}, &stacks, nil); err != nil || stacks.Goroutines < 2 || !strings.Contains(stacks.Text, "userd.(*Daemon).Run") {
		t.Errorf("%d goroutines, %v:\n%s", stacks.Goroutines, err, stacks.Text)
	}
	if err := c.Call(ctx, localapi.MethodQuit, localapi.QuitRequest{}, nil, nil); err != nil {
		t.Errorf("quit without a session: %v", err)
	}
	second, err := New(cfg)
	if err != nil {
		t.Fatal(err)
	}
	if err := second.Run(ctx); err == nil {
		t.Error("a second daemon runs")
	}
	cancel() // SIGTERM
	if err := <-done; err != nil {
		t.Error(err)
	}
	if _, err := os.Stat(cfg.Socket); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("the socket is left behind: %v", err)
	}
}

// quit -s is answered before the daemon ends.
func TestQuitStopsTheDaemon(t *testing.T) {
	c, _, done := runDaemon(t, t.Context())
	var steps []string
	if err := c.Call(t.Context(), localapi.MethodQuit, localapi.QuitRequest{Stop: true}, nil, func(s string) { steps = append(steps, s) }); err != nil || len(steps) != 1 {
		t.Errorf("%v, %q", err, steps)
	}
	select {
	case err := <-done:
		if err != nil {
			t.Error(err)
		}
	case <-time.After(deadline):
		t.Error("it goes on")
	}
	if err := c.Call(t.Context(), localapi.MethodStatus, localapi.Empty{}, nil, nil); !errors.Is(err, localapi.ErrNoDaemon) {
		t.Errorf("got %v", err)
	}
}

func TestNew(t *testing.T) {
	if _, err := New(Config{}); err == nil {
		t.Error("an empty configuration was accepted")
	}
}

// The VIF has an IPv6 address only where something is routed there: a laptop with IPv6 off need not hear of it.
func TestVIFAddrs(t *testing.T) {
	v4, v6 := netip.MustParsePrefix("10.96.0.0/16"), netip.MustParsePrefix("fd10:96::/108")
	if got := vifAddrs([]netip.Prefix{v4}); !slices.Equal(got, []netip.Prefix{vifAddr}) {
		t.Errorf("IPv4 alone: %v", got)
	}
	if got := vifAddrs([]netip.Prefix{v4, v6}); !slices.Equal(got, []netip.Prefix{vifAddr, vifAddr6}) {
		t.Errorf("both: %v", got)
	}
}

// newDaemon makes one that serves nobody.
func newDaemon(t *testing.T) (d *Daemon, stopped chan struct{}) {
	t.Helper()
	d, err := New(Config{
		Socket: filepath.Join(t.TempDir(), "daemon.sock"), RootSocket: func() string { return filepath.Join(t.TempDir(), "rootd.sock") },
		Root: func(context.Context, rootapi.Options) (*rootapi.Client, error) {
			return nil, errors.New("no root daemon in this test")
		},
		Log: slog.New(slog.NewTextHandler(t.Output(), nil)),
	})
	if err != nil {
		t.Fatal(err)
	}
	stopped = make(chan struct{})
	d.stop = func() { close(stopped) }
	return d, stopped
}

func quiet(string, ...any) {}

// The clean-up of a connect that has failed leaves alone what another connect has made meanwhile.
func TestQuitIfIdle(t *testing.T) {
	d, stopped := newDaemon(t)
	if err := d.keep(newCluster(t).connect()); err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	res, err := d.quit(ctx, localapi.QuitRequest{Stop: true, IfIdle: true}, quiet)
	if err != nil || !res.Kept || len(d.all()) != 1 || d.isStopping() {
		t.Fatalf("in use: %+v, %v, %d sessions", res, err, len(d.all()))
	}
	cancel() // the answer is out
	if s := d.all()[0]; !d.take(s) {
		t.Fatal("it is not there")
	}
	ctx, cancel = context.WithCancel(t.Context())
	if res, err := d.quit(ctx, localapi.QuitRequest{Stop: true, IfIdle: true}, quiet); err != nil || res.Kept {
		t.Errorf("idle: %+v, %v", res, err)
	}
	cancel()
	<-stopped
}

// A connect that has waited for a quit -s is not told that it has connected: the daemon is about to end.
func TestConnectAfterStop(t *testing.T) {
	d, _ := newDaemon(t)
	if _, err := d.quit(t.Context(), localapi.QuitRequest{Stop: true}, quiet); err != nil {
		t.Fatal(err)
	}
	_, err := d.connect(t.Context(), localapi.ConnectRequest{Kubeconfig: "/nonexistent"}, quiet)
	wantError(t, err, uerr.Conflict, "just told to end", "doppel connect")
	if err := d.keep(&session{}); err == nil || len(d.all()) != 0 {
		t.Errorf("a session that was made meanwhile: %v, %d sessions", err, len(d.all()))
	}
}

// Who waits for a connect to end, to connect or to quit, can be interrupted, and has done nothing then.
func TestTurnInterrupted(t *testing.T) {
	d, stopped := newDaemon(t)
	asked, held := make(chan struct{}, 1), make(chan struct{})
	release := sync.OnceFunc(func() { close(held) })
	api := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
		asked <- struct{}{}
		<-held
		http.Error(w, "no", http.StatusForbidden)
	}))
	defer api.Close()
	defer release()
	file := filepath.Join(t.TempDir(), "config")
	text := fmt.Sprintf(`{apiVersion: v1, kind: Config, current-context: x, clusters: [{name: c, cluster: {server: %q}}],
users: [{name: u, user: {token: t}}], contexts: [{name: x, context: {cluster: c, user: u}}]}`, api.URL)
	if err := os.WriteFile(file, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	connected := make(chan error, 1)
	go func() {
		_, err := d.connect(t.Context(), localapi.ConnectRequest{Kubeconfig: file}, quiet)
		connected <- err
	}()
	<-asked
	interrupted, cancel := context.WithCancel(t.Context())
	cancel()
	waited := make(chan error, 2)
	go func() {
		_, err := d.quit(interrupted, localapi.QuitRequest{Stop: true}, quiet)
		waited <- err
		_, err = d.connect(interrupted, localapi.ConnectRequest{}, quiet)
		waited <- err
	}()
	for range 2 {
		select {
		case err := <-waited:
			wantError(t, err, uerr.Canceled, "interrupted", "")
		case <-time.After(deadline):
			t.Fatal("it goes on waiting")
		}
	}
	release()
	if err := <-connected; err == nil {
		t.Error("connected to a cluster that refuses")
	}
	select {
	case <-stopped:
		t.Error("an interrupted quit -s has ended the daemon")
	default:
	}
}
