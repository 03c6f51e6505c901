package e2e

import (
	"bufio"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"net/http"
	"os"
	"os/exec"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"
)

// answer is one request of a load: when it began, how long it took, and what came back.
type answer struct {
	Kind   string        `json:"kind,omitempty"`  // of mixed traffic
	Taken  bool          `json:"taken,omitempty"` // an intercept is to get it
	Start  time.Time     `json:"start"`
	Took   time.Duration `json:"took"`
	Body   string        `json:"body,omitempty"`
	Status int           `json:"status,omitempty"`
	Err    string        `json:"err,omitempty"`
}

// helper is what this binary does in another network namespace.
func helper(name string, args []string) int {
	if name == "lookups" && len(args) == 4 {
		return lookups(args)
	}
	helpers := map[string]func(string) int{"load": loadHelper, "rate": rateHelper, "traffic": trafficHelper, "serve": serveHelper, "keep": keepHelper, "fetch": fetchHelper, "download": downloadHelper, "proxy": proxyHelper, "forward": forwardHelper, "people": peopleHelper, "crowd": crowdHelper, "silently": silentlyHelper, "swallow": swallowHelper}
	if helpers[name] == nil || len(args) != 1 {
		fmt.Fprintln(os.Stderr, "unknown helper", name, args)
		return 2
	}
	return helpers[name](args[0])
}

// stdinEnds returns a channel that is closed when standard input ends: who has started a helper wants it to end.
func stdinEnds() <-chan struct{} {
	ended := make(chan struct{})
	go func() {
		_, _ = io.Copy(io.Discard, os.Stdin) // an error is an end too
		close(ended)
	}()
	return ended
}

// loadHelper asks a URL again and again, each time on a connection of its own, and prints an answer a line, until its standard
// input ends.
func loadHelper(url string) int {
	ended := stdinEnds()
	enc := json.NewEncoder(os.Stdout)
	client := &http.Client{Timeout: 5 * time.Second, Transport: &http.Transport{DisableKeepAlives: true}}
	for {
		select {
		case <-ended:
			return 0
		case <-time.After(10 * time.Millisecond):
		}
		if err := enc.Encode(ask(client, url)); err != nil {
			return 1
		}
	}
}

func ask(c *http.Client, url string) answer {
	a := answer{Start: time.Now()}
	// A body that cannot be had twice: no request is sent again behind our back.
	req, err := http.NewRequest(http.MethodGet, url, io.NopCloser(strings.NewReader("once")))
	if err != nil {
		return answer{Err: err.Error()}
	}
	if name, value, ok := strings.Cut(req.URL.Fragment, "="); ok { // a header; no server gets to see a fragment
		req.Header.Set(name, value)
	}
	req.ContentLength = int64(len("once")) // or the body comes after the answer: the sample application does not read it
	resp, err := c.Do(req)
	if err == nil {
		var b []byte
		b, err = io.ReadAll(resp.Body)
		_ = resp.Body.Close()
		a.Body, a.Status = strings.TrimSpace(string(b)), resp.StatusCode
	}
	if err != nil {
		a.Err = err.Error()
	}
	a.Took = time.Since(a.Start)
	return a
}

// load is a helper that asks a URL from a node of the cluster.
type load struct {
	cmd  *exec.Cmd
	in   io.Closer
	read chan struct{} // closed when the last answer was read

	mu sync.Mutex
	// guarded by mu
	all []answer
}

// load starts asking; it returns when the first answers have come.
func (c *cluster) load(t *testing.T, url string) *load { return c.begin(t, "load", url) }

// begin starts a helper that asks a URL.
func (c *cluster) begin(t *testing.T, helper, url string) *load {
	t.Helper()
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	l := &load{read: make(chan struct{})}
	l.cmd = exec.CommandContext(context.Background(), c.bin("lab"), "--name", labName, "node", "exec", "--", "env", envHelper+"="+helper, self, url)
	if l.in, err = l.cmd.StdinPipe(); err != nil {
		t.Fatal(err)
	}
	out, err := l.cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	l.cmd.Stderr = os.Stderr
	if err := l.cmd.Start(); err != nil {
		t.Fatal(err)
	}
	go l.collect(out)
	t.Cleanup(func() { l.stop() })
	l.more(t, 5)
	return l
}

func (l *load) collect(r io.Reader) {
	defer close(l.read)
	for sc := bufio.NewScanner(r); sc.Scan(); {
		var a answer
		if json.Unmarshal(sc.Bytes(), &a) == nil {
			l.mu.Lock()
			l.all = append(l.all, a)
			l.mu.Unlock()
		}
	}
}

// more waits for n further answers.
func (l *load) more(t *testing.T, n int) {
	t.Helper()
	from := l.count()
	eventually(t, time.Minute, func() error {
		if got := l.count() - from; got < n {
			return fmt.Errorf("%d of %d answers", got, n)
		}
		return nil
	})
}

func (l *load) count() int {
	l.mu.Lock()
	defer l.mu.Unlock()
	return len(l.all)
}

// since are the answers after the first n.
func (l *load) since(n int) []answer {
	l.mu.Lock()
	defer l.mu.Unlock()
	return slices.Clone(l.all[n:])
}

// take is since(0), and they are forgotten.
func (l *load) take() []answer {
	l.mu.Lock()
	defer l.mu.Unlock()
	all := l.all
	l.all = nil
	return all
}

// stop ends the load and returns all answers.
func (l *load) stop() []answer {
	_ = l.in.Close()
	<-l.read
	_ = l.cmd.Wait() // its answers say more than its exit code
	return l.all
}

// bodies counts the answers by what came back; errors count by their text.
func bodies(as []answer) map[string]int {
	m := map[string]int{}
	for _, a := range as {
		if a.Err != "" {
			m["error: "+a.Err]++
		} else {
			m[a.Body]++
		}
	}
	return m
}
