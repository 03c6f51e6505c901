package relay

import (
	"bufio"
	"context"
	"crypto/tls"
	"crypto/x509"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"net/url"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"regexp"
	"runtime/debug"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/doppel-dev/doppel/internal/relayapi"
)

// 1,000 visitors at once of 100 previews: each gets what the preview that they asked for has, and nothing of another.
func TestManyVisitors(t *testing.T) {
	w := newWorld(t)
	ann := w.first("ann@example.com").login()
	c := ann.cluster("prod", echo)
	previews := make([]relayapi.Preview, 100)
	for i := range previews {
		previews[i] = ann.preview(c, fmt.Sprintf("app%d", i))
		ann.must(relayapi.PathPublishPreview, relayapi.PublishRequest{Preview: previews[i].Host, Public: true}, nil)
	}
	var wg sync.WaitGroup
	at := make(chan struct{}, 100) // as many TLS handshakes at once
	for n := range 1000 {
		wg.Go(func() {
			at <- struct{}{}
			defer func() { <-at }()
			p := previews[n%len(previews)]
			tr := &http.Transport{DialContext: w.dial, TLSClientConfig: &tls.Config{RootCAs: w.roots}}
			defer tr.CloseIdleConnections()
			for range 3 {
				resp, err := (&http.Client{Transport: tr, Timeout: 30 * time.Second}).Get(fmt.Sprintf("%svisitor%d", p.URL, n))
				if err != nil {
					t.Error(err)
					return
				}
				body, err := io.ReadAll(resp.Body)
				resp.Body.Close()
				if want := fmt.Sprintf("GET /visitor%d host=%s.%s id=[%q]", n, p.Host, domain, p.ID); err != nil || !strings.HasPrefix(string(body), want) {
					t.Errorf("%d %q, %v, want %q", resp.StatusCode, body, err, want)
				}
			}
		})
	}
	wg.Wait()
}

// envChild has this program be a relay in the directory that it names, so that its memory and work are told from those of visitors and cluster.
const envChild = "DOPPEL_TEST_RELAY_DIR"

func child(dir string) error {
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGTERM)
	defer stop()
	r, err := New(ctx, testConfig(dir, os.Stdout))
	if err != nil {
		return err
	}
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		return err
	}
	health, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		return err
	}
	fmt.Printf("addr %s health %s\n", l.Addr(), health.Addr())
	free := make(chan os.Signal, 1)
	signal.Notify(free, syscall.SIGUSR1)
	go func() {
		for range free { // garbage is no memory that anything takes
			debug.FreeOSMemory()
			fmt.Println("freed")
		}
	}()
	return r.Serve(ctx, l, health, nil)
}

// process is a relay in a process of its own.
type process struct {
	*world
	health string
	cmd    *exec.Cmd
	lines  *bufio.Scanner // what it prints
}

func newProcess(b *testing.B) *process {
	b.Helper()
	dir := b.TempDir()
	cmd := exec.Command(os.Args[0])
	cmd.Env = append(os.Environ(), envChild+"="+dir)
	out, err := cmd.StdoutPipe()
	if err != nil {
		b.Fatal(err)
	}
	cmd.Stderr = os.Stderr
	if err := cmd.Start(); err != nil {
		b.Fatal(err)
	}
	b.Cleanup(func() {
		_ = cmd.Process.Signal(syscall.SIGTERM)
		_ = cmd.Wait()
	})
	p := &process{world: &world{t: b, roots: x509.NewCertPool()}, cmd: cmd, lines: bufio.NewScanner(out)}
	for p.setup == "" && p.lines.Scan() {
		if _, err := fmt.Sscanf(p.lines.Text(), "addr %s health %s", &p.addr, &p.health); err != nil && strings.HasPrefix(p.lines.Text(), "https://") {
			p.setup = p.lines.Text()
		}
	}
	pem, err := os.ReadFile(filepath.Join(dir, caFile))
	if err != nil || !p.roots.AppendCertsFromPEM(pem) {
		b.Fatal("no CA", err)
	}
	return p
}

// metric is one of the relay's.
func (p *process) metric(name string) float64 {
	p.t.Helper()
	resp, err := http.Get("http://" + p.health + "/metrics")
	if err != nil {
		p.t.Fatal(err)
	}
	defer resp.Body.Close()
	body, err := io.ReadAll(resp.Body)
	m := regexp.MustCompile(`(?m)^` + name + ` (\S+)`).FindSubmatch(body)
	if err != nil || m == nil {
		p.t.Fatalf("no %s in the metrics: %v", name, err)
	}
	n, err := strconv.ParseFloat(string(m[1]), 64)
	if err != nil {
		p.t.Fatal(err)
	}
	return n
}

// memory is the relay's resident memory in KiB, without garbage.
func (p *process) memory() float64 {
	p.t.Helper()
	if err := p.cmd.Process.Signal(syscall.SIGUSR1); err != nil || !p.lines.Scan() {
		p.t.Fatal("the relay does not answer", err)
	}
	return p.metric("process_resident_memory_bytes") / 1024
}

// ways are the two that a request can take: to the app, as the cluster's ingress gets it, and through relay and link. Both over TLS.
func (p *process) ways(app http.HandlerFunc) (direct, relayed func(path string) (*http.Response, error), l *laptop, c *cluster) {
	p.t.Helper()
	l = p.first("ann@example.com").login()
	c = l.cluster("prod", app)
	v := l.preview(c, "web")
	l.must(relayapi.PathPublishPreview, relayapi.PublishRequest{Preview: v.Host, Public: true}, nil)
	srv := httptest.NewUnstartedServer(app)
	srv.EnableHTTP2 = true
	srv.StartTLS()
	p.t.Cleanup(srv.Close)
	tr := &http.Transport{DialContext: p.dial, TLSClientConfig: &tls.Config{RootCAs: p.roots}, ForceAttemptHTTP2: true, DisableCompression: true}
	p.t.Cleanup(tr.CloseIdleConnections)
	visitor := http.Client{Transport: tr, Timeout: time.Minute}
	return func(path string) (*http.Response, error) { return srv.Client().Get(srv.URL + "/" + path) },
		func(path string) (*http.Response, error) { return visitor.Get(v.URL + path) }, l, c
}

// took does a request and returns how long it took until all of the answer was there.
func took(b *testing.B, get func(path string) (*http.Response, error), path string, want int64) time.Duration {
	start := time.Now()
	resp, err := get(path)
	if err != nil {
		b.Error(err)
		return 0
	}
	defer resp.Body.Close()
	if n, err := io.Copy(io.Discard, resp.Body); err != nil || n != want || resp.StatusCode != http.StatusOK {
		b.Errorf("%d, %d bytes, %v", resp.StatusCode, n, err)
	}
	return time.Since(start)
}

func median[T int64 | float64](all []T) T {
	slices.Sort(all)
	return all[len(all)/2]
}

func small(w http.ResponseWriter, _ *http.Request) { _, _ = io.WriteString(w, "ok\n") }

// BenchmarkRequest is a small request without and with the relay, alternating in one run: the median of each, and of what the relay adds.
func BenchmarkRequest(b *testing.B) {
	p := newProcess(b)
	direct, relayed, _, _ := p.ways(small) //nolint:bodyclose // took closes them
	took(b, direct, "", 3)
	took(b, relayed, "", 3)
	var without, with []int64
	for b.Loop() {
		without = append(without, took(b, direct, "", 3).Microseconds())
		with = append(with, took(b, relayed, "", 3).Microseconds())
	}
	d, r := median(without), median(with)
	b.ReportMetric(float64(d), "direct-p50-µs")
	b.ReportMetric(float64(r), "relay-p50-µs")
	b.ReportMetric(float64(r-d), "added-p50-µs")
	b.ReportMetric(0, "ns/op")
}

// BenchmarkThroughput is how many small requests of 32 visitors are answered in a second, in alternating rounds.
func BenchmarkThroughput(b *testing.B) {
	p := newProcess(b)
	direct, relayed, _, _ := p.ways(small) //nolint:bodyclose // took closes them
	const visitors, each = 32, 30
	round := func(get func(string) (*http.Response, error)) float64 {
		var wg sync.WaitGroup
		start := time.Now()
		for range visitors {
			wg.Go(func() {
				for range each {
					took(b, get, "", 3)
				}
			})
		}
		wg.Wait()
		return visitors * each / time.Since(start).Seconds()
	}
	var without, with []float64
	for b.Loop() {
		without, with = append(without, round(direct)), append(with, round(relayed))
	}
	b.ReportMetric(median(without), "direct-req/s")
	b.ReportMetric(median(with), "relay-req/s")
	b.ReportMetric(0, "ns/op")
}

// BenchmarkBulk is one download of 64 MiB, alternating.
func BenchmarkBulk(b *testing.B) {
	const size = 64 << 20
	p := newProcess(b)
	direct, relayed, _, _ := p.ways(func(w http.ResponseWriter, _ *http.Request) { //nolint:bodyclose // took closes them
		_, _ = io.CopyN(w, zeros{}, size)
	})
	rate := func(get func(string) (*http.Response, error)) float64 {
		return size / 1e6 / took(b, get, "", size).Seconds()
	}
	var without, with []float64
	for b.Loop() {
		without, with = append(without, rate(direct)), append(with, rate(relayed))
	}
	b.ReportMetric(median(without), "direct-MB/s")
	b.ReportMetric(median(with), "relay-MB/s")
	b.ReportMetric(0, "ns/op")
}

// BenchmarkWebSockets is what 100 open WebSockets take, and how long a message and its echo take on one of them; and what 1,000 previews take that
// nobody looks at.
func BenchmarkWebSockets(b *testing.B) {
	p := newProcess(b)
	_, relayed, l, c := p.ways(echo) //nolint:bodyclose // it is closed below
	if resp, err := relayed(""); err == nil {
		resp.Body.Close()
	}
	v := l.preview(c, "web")
	before := p.memory()
	const sockets = 100
	open := make([]*bufio.ReadWriter, sockets)
	for i := range open {
		open[i] = p.browser().webSocket(v.URL)
	}
	perSocket := (p.memory() - before) / sockets
	var trips []int64
	for b.Loop() {
		for _, ws := range open {
			start := time.Now()
			if err := p.ping(ws); err != nil {
				b.Fatal(err)
			}
			trips = append(trips, time.Since(start).Microseconds())
		}
	}
	b.ReportMetric(perSocket, "KiB/socket")
	b.ReportMetric(float64(median(trips)), "echo-p50-µs")
	before = p.memory()
	const previews = 1000
	for i := range previews {
		l.preview(c, fmt.Sprintf("idle%d", i))
	}
	b.ReportMetric((p.memory()-before)/previews, "KiB/preview")
	b.ReportMetric(p.memory()/1024, "MiB")
	b.ReportMetric(0, "ns/op")
}

// BenchmarkLivePages is what 50 open pages of one preview take, as browsers keep them up to date, while it has 500 visitors' requests a second: how
// often each is told of a change, what it gets for that, and the relay's share of a core without and with the pages.
func BenchmarkLivePages(b *testing.B) {
	const persons, each, perSecond, lasts = 2, 25, 500, 8 * time.Second
	p := newProcess(b)
	_, relayed, l, _ := p.ways(small) //nolint:bodyclose // took closes them
	var all relayapi.PreviewList
	l.must(relayapi.PathListPreviews, struct{}{}, &all)
	page := "/previews/" + all.Previews[0].Host
	// load has visitors come for a while, and returns the relay's share of a core meanwhile.
	load := func() float64 {
		before, start := p.metric("process_cpu_seconds_total"), time.Now()
		var wg sync.WaitGroup
		tick := time.NewTicker(time.Second / perSecond * 10)
		defer tick.Stop()
		for time.Since(start) < lasts {
			for range 10 {
				wg.Go(func() { took(b, relayed, "", 3) })
			}
			<-tick.C
		}
		wg.Wait()
		return (p.metric("process_cpu_seconds_total") - before) / time.Since(start).Seconds()
	}
	admin := p.browser()
	if a := admin.submit("/login", url.Values{"email": {"ann@example.com"}, "password": {password}}); a.status != http.StatusOK {
		b.Fatal(a)
	}
	viewers := []*browser{admin}
	for len(viewers) < persons {
		team := regexp.MustCompile(`name="team"[^>]*value="([^"]+)"`).FindStringSubmatch(admin.visit("https://" + domain + "/people").body)
		link := inviteLink.FindString(admin.submit("/people/invite", url.Values{"team": team[1:], "role": {"member"}}).body)
		u, err := url.Parse(link)
		if err != nil {
			b.Fatal(err)
		}
		v := p.browser()
		if a := v.submit("/invite", url.Values{"token": u.Query()["token"], "email": {"bob@example.com"}, "name": {"Bob"}, "password": {password}}); a.status != http.StatusOK {
			b.Fatal(a)
		}
		viewers = append(viewers, v)
	}
	took(b, relayed, "", 3)
	for b.Loop() {
		without := load()
		var events, bytes atomic.Int64
		ctx, cancel := context.WithCancel(b.Context())
		var open sync.WaitGroup
		for _, v := range viewers {
			for range each {
				s, status := v.listenFor(ctx, page)
				if status != http.StatusOK {
					b.Fatal(status)
				}
				open.Go(func() { // what live.js does
					for line := range s.lines {
						events.Add(1)
						bytes.Add(int64(len(line)))
						if ctx.Err() == nil {
							bytes.Add(int64(len(v.visit("https://" + domain + page).body)))
						}
					}
				})
			}
		}
		with := load()
		cancel()
		open.Wait()
		seconds := lasts.Seconds() * persons * each
		b.ReportMetric(float64(events.Load())/seconds, "events/page/s")
		b.ReportMetric(float64(bytes.Load())/seconds/1000, "kB/page/s")
		b.ReportMetric(without, "cores-without")
		b.ReportMetric(with, "cores-with")
	}
	b.ReportMetric(0, "ns/op")
}
