//go:build linux

package cli

import (
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"testing"

	"github.com/rogpeppe/go-internal/testscript"

	"github.com/doppel-dev/doppel/internal/buildinfo"
	"github.com/doppel-dev/doppel/internal/localapi"
	"github.com/doppel-dev/doppel/internal/rootapi"
)

var update = flag.Bool("update", false, "write the golden parts of testdata/script/*.txtar")

func TestMain(m *testing.M) {
	testscript.Main(m, map[string]func(){"doppel": func() { os.Exit(Main(os.Args[1:])) }})
}

// TestScripts runs testdata/script/*.txtar: one behaviour a file. Besides testscript's own commands there are
//
//	daemon FILE     a user daemon that answers as FILE says, and something that listens as the root daemon does
//	rootd PROTOCOL  it is one of another protocol
//	exits N ARGS    doppel ARGS ends with exit code N
//	requests FILE   what the daemon was asked so far is FILE
//	asked N METHOD  the daemon was asked for METHOD N times
func TestScripts(t *testing.T) {
	testscript.Run(t, testscript.Params{
		Dir:           filepath.Join("testdata", "script"),
		UpdateScripts: *update,
		Setup: func(e *testscript.Env) error {
			e.Setenv("GORACE", "atexit_sleep_ms=0") // the race detector waits a second at the end of every program otherwise
			e.Setenv("HOME", e.WorkDir)
			e.Setenv("TZ", "UTC")
			e.Setenv("XDG_RUNTIME_DIR", e.WorkDir)
			e.Setenv("XDG_STATE_HOME", filepath.Join(e.WorkDir, "state"))
			e.Setenv("DOPPEL_ROOT_SOCKET", filepath.Join(e.WorkDir, "rootd.sock"))
			e.Setenv("KUBECONFIG", filepath.Join(e.WorkDir, "kubeconfig"))
			e.Setenv("VERSION", buildinfo.Version)
			e.Setenv("BUILD", buildinfo.String())
			return nil
		},
		Cmds: map[string]func(*testscript.TestScript, bool, []string){
			"daemon": cmdDaemon, "exits": cmdExits, "requests": cmdRequests, "asked": cmdAsked, "ends": cmdEnds, "rootd": cmdRootd,
		},
	})
}

func cmdExits(ts *testscript.TestScript, neg bool, args []string) {
	if neg || len(args) == 0 {
		ts.Fatalf("usage: exits N ARGS")
	}
	err := ts.Exec("doppel", args[1:]...)
	code := 0
	var ee *exec.ExitError
	if errors.As(err, &ee) {
		code = ee.ExitCode()
	} else if err != nil {
		ts.Fatalf("%v", err)
	}
	if strconv.Itoa(code) != args[0] {
		ts.Fatalf("doppel %s: exit code %d, want %s", strings.Join(args[1:], " "), code, args[0])
	}
}

// answer is what the fake daemon says to one call of a method: events as they stand, and in the end possibly nothing at all.
type answer struct {
	Progress []string        `json:"progress"`
	Result   json.RawMessage `json:"result"`
	Error    json.RawMessage `json:"error"`
	Dies     bool            `json:"dies"` // after the progress, as by kill -9
}

// fakeDaemon answers the local API from a file: for each method the answers in their order, the last one again and again.
type fakeDaemon struct {
	protocol atomic.Int64 // of the root daemon
	service  atomic.Bool  // so is that

	mu sync.Mutex
	// guarded by mu
	answers  map[string][]answer
	requests []string
}

func cmdDaemon(ts *testscript.TestScript, neg bool, args []string) {
	if neg || len(args) != 1 {
		ts.Fatalf("usage: daemon FILE")
	}
	d := &fakeDaemon{}
	d.protocol.Store(rootapi.Protocol)
	text := strings.ReplaceAll(ts.ReadFile(args[0]), "$VERSION", buildinfo.Version)
	if err := json.Unmarshal([]byte(text), &d.answers); err != nil {
		ts.Fatalf("%s: %v", args[0], err)
	}
	l, err := localapi.Listen(filepath.Join(ts.Getenv("XDG_RUNTIME_DIR"), "doppel", "daemon.sock"))
	ts.Check(err)
	srv := &http.Server{Handler: d}
	go func() { _ = srv.Serve(l) }()
	root, err := net.Listen("unixpacket", ts.Getenv("DOPPEL_ROOT_SOCKET"))
	ts.Check(err)
	go func() {
		for {
			c, err := root.Accept()
			if err != nil {
				return
			}
			go d.rootAnswers(c)
		}
	}()
	ts.Defer(func() { _ = srv.Close(); _ = root.Close() })
	daemons.Store(ts, d)
}

// noPID is more than Linux has (proc(5), pid_max).
const noPID = 4194305

// rootAnswers says who it is.
func (d *fakeDaemon) rootAnswers(c net.Conn) {
	defer c.Close()
	buf := make([]byte, rootapi.MaxPacket)
	for {
		size, err := c.Read(buf)
		if err != nil {
			return
		}
		m, err := rootapi.Decode(buf[:size])
		if err != nil {
			return
		}
		b, err := rootapi.Message{ID: m.ID, Op: rootapi.OpReply, Version: &rootapi.Version{Program: "fake", Protocol: int(d.protocol.Load()), PID: noPID, Service: d.service.Load()}}.Encode()
		if err != nil {
			return
		}
		if _, err := c.Write(b); err != nil {
			return
		}
	}
}

// cmdRootd makes the root daemon of daemon one of another protocol.
func cmdRootd(ts *testscript.TestScript, neg bool, args []string) {
	v, ok := daemons.Load(ts)
	if neg || len(args) != 1 || !ok {
		ts.Fatalf("usage: rootd PROTOCOL, after daemon")
	}
	n, err := strconv.Atoi(args[0])
	ts.Check(err)
	v.(*fakeDaemon).protocol.Store(int64(n))
}

var daemons sync.Map // *testscript.TestScript to *fakeDaemon

func cmdRequests(ts *testscript.TestScript, neg bool, args []string) {
	v, ok := daemons.Load(ts)
	if neg || len(args) != 1 || !ok {
		ts.Fatalf("usage: requests FILE, after daemon")
	}
	d := v.(*fakeDaemon)
	d.mu.Lock()
	got := strings.ReplaceAll(strings.Join(d.requests, "\n")+"\n", ts.Getenv("WORK"), "$WORK")
	d.mu.Unlock()
	if want := ts.ReadFile(args[0]); got != want {
		ts.Fatalf("the daemon was asked\n%swant\n%s", got, want)
	}
}

// cmdEnds compares what was asked to end something with a file.
func cmdEnds(ts *testscript.TestScript, neg bool, args []string) {
	v, ok := daemons.Load(ts)
	if neg || len(args) != 1 || !ok {
		ts.Fatalf("usage: ends FILE, after daemon")
	}
	d := v.(*fakeDaemon)
	d.mu.Lock()
	defer d.mu.Unlock()
	got := ""
	for _, r := range d.requests {
		if strings.HasPrefix(r, "leave ") || strings.HasPrefix(r, "quit ") {
			got += r + "\n"
		}
	}
	if want := ts.ReadFile(args[0]); got != want {
		ts.Fatalf("the daemon was asked\n%swant\n%s", got, want)
	}
}

func cmdAsked(ts *testscript.TestScript, neg bool, args []string) {
	v, ok := daemons.Load(ts)
	if neg || len(args) != 2 || !ok {
		ts.Fatalf("usage: asked N METHOD, after daemon")
	}
	d := v.(*fakeDaemon)
	d.mu.Lock()
	defer d.mu.Unlock()
	n := 0
	for _, r := range d.requests {
		if strings.HasPrefix(r, args[1]+" ") {
			n++
		}
	}
	if strconv.Itoa(n) != args[0] {
		ts.Fatalf("asked %d times, want %s", n, args[0])
	}
}

func (d *fakeDaemon) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	method := strings.TrimPrefix(r.URL.Path, "/v1/")
	body, _ := io.ReadAll(r.Body)
	d.mu.Lock()
	d.requests = append(d.requests, fmt.Sprintf("%s %s", method, strings.TrimSpace(string(body))))
	list := d.answers[method]
	if len(list) > 1 {
		d.answers[method] = list[1:]
	}
	d.mu.Unlock()
	if len(list) == 0 {
		http.NotFound(w, r)
		return
	}
	a := list[0]
	enc := json.NewEncoder(w)
	for _, p := range a.Progress {
		_ = enc.Encode(localapi.Event{Progress: p})
	}
	_ = http.NewResponseController(w).Flush()
	if a.Dies {
		panic(http.ErrAbortHandler)
	}
	for key, v := range map[string]json.RawMessage{"error": a.Error, "result": a.Result} {
		if v != nil {
			_ = enc.Encode(map[string]json.RawMessage{key: v})
			return
		}
	}
}
