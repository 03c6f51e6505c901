package agent

import (
	"bytes"
	"context"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/doppel-dev/doppel/internal/control"
	"github.com/doppel-dev/doppel/internal/mux"
	"github.com/doppel-dev/doppel/internal/mux/muxtest"
	"github.com/doppel-dev/doppel/internal/tunnel"
	"github.com/doppel-dev/doppel/internal/wire"
)

// tape is what laptops got of wiretaps.
type tape struct {
	mu sync.Mutex
	// guarded by mu
	got  map[string][]string // by wiretap: each flow that ended, and "!" behind one that was reset
	open int
}

// take is a local process that answers a lot, which nobody gets.
func (p *tape) take(r *mux.Request, h wire.InterceptHeader) {
	st, err := r.Accept(nil)
	if err != nil {
		return
	}
	p.mu.Lock()
	p.open++
	p.mu.Unlock()
	_, _ = io.WriteString(st, "nobody reads this")
	b, err := io.ReadAll(st)
	_ = st.Close()
	p.mu.Lock()
	defer p.mu.Unlock()
	p.open--
	if p.got == nil {
		p.got = map[string][]string{}
	}
	text := string(b)
	if err != nil {
		text += "!"
	}
	p.got[h.Intercept] = append(p.got[h.Intercept], text)
}

func (p *tape) of(tap string) []string {
	p.mu.Lock()
	defer p.mu.Unlock()
	return append([]string{}, p.got[tap]...)
}

func tapEntry(uid string) control.TableEntry {
	return control.TableEntry{Intercept: uid, Wiretap: true}
}

// talk sends text through the agent, ends its side and returns all of the answer.
func (w *world) talk(text string) string {
	w.t.Helper()
	c := w.dial(w.cfg.Ports[0].AgentPort)
	defer c.Close()
	_ = c.SetDeadline(time.Now().Add(deadline))
	go func() {
		_, _ = io.WriteString(c, text)
		_ = c.CloseWrite()
	}()
	b, err := io.ReadAll(c)
	if err != nil {
		w.t.Fatal(err)
	}
	return string(b)
}

// Several wiretaps get what clients send, byte for byte with the end, whoever answers; their own answers reach nobody.
func TestWiretap(t *testing.T) {
	w := start(t, false)
	var p tape
	w.mgr.set(func(r *mux.Request, h wire.InterceptHeader) {
		if h.Intercept == "all" {
			laptop(r, h)
			return
		}
		p.take(r, h)
	})
	s := w.mgr.up()
	text := strings.Repeat("0123456789abcdef", 8<<10)
	for _, row := range []struct {
		who  string
		also []control.TableEntry
	}{
		{"app", nil},
		{"laptop", []control.TableEntry{{Intercept: "all"}}},
		{"app", []control.TableEntry{byHeader("some", "lou")}}, // what is not HTTP is not that intercept's
	} {
		p.mu.Lock()
		p.got = nil
		p.mu.Unlock()
		w.table(s, append(row.also, tapEntry("a"), tapEntry("b"))...)
		if got, want := w.talk(text), row.who+"\n"+text+"bye from "+row.who; got != want {
			t.Errorf("%s: the client got %d bytes, want %d", row.who, len(got), len(want))
		}
		for _, tap := range []string{"a", "b"} {
			w.until("the copy has ended", func() bool { return len(p.of(tap)) == 1 })
			if got := p.of(tap)[0]; got != text {
				t.Errorf("%s, wiretap %s: %d bytes, want %d", row.who, tap, len(got), len(text))
			}
		}
	}
}

// A client's FIN is passed on while the answer still comes, and its RST as a RST.
func TestWiretapEnds(t *testing.T) {
	w := startBefore(t, newApp(t, func(c *net.TCPConn) {
		defer c.Close()
		_, _ = io.Copy(io.Discard, c)
		_, _ = io.WriteString(c, "at last")
		_, _ = io.Copy(io.Discard, c)
	}), false)
	var p tape
	w.mgr.set(p.take)
	w.table(w.mgr.up(), tapEntry("a"))
	if got := w.talk("half"); got != "at last" {
		t.Errorf("the client got %q", got)
	}
	w.until("the first copy has ended", func() bool { return len(p.of("a")) == 1 }) // else it may be the one that is open below
	c := w.dial(w.cfg.Ports[0].AgentPort)
	_, _ = io.WriteString(c, "cut off")
	w.until("the copy was begun", func() bool { p.mu.Lock(); defer p.mu.Unlock(); return p.open == 1 })
	_ = c.SetLinger(0)
	_ = c.Close()
	w.until("both have ended", func() bool { return len(p.of("a")) == 2 })
	if got := p.of("a"); got[0] != "half" || !strings.HasSuffix(got[1], "!") {
		t.Errorf("%q", got)
	}
}

// A laptop that refuses, is gone, or accepts and never reads, costs the original nothing.
func TestWiretapLaptops(t *testing.T) {
	text := strings.Repeat("x", 4*copyQueue)
	stuck := make(chan struct{})
	defer close(stuck)
	for name, take := range map[string]func(*mux.Request, wire.InterceptHeader){
		"refuses": func(r *mux.Request, _ wire.InterceptHeader) { _ = r.Reject(wire.CodeRefused, "") },
		"silent":  func(*mux.Request, wire.InterceptHeader) { <-stuck },
		"slow": func(r *mux.Request, _ wire.InterceptHeader) {
			if _, err := r.Accept(nil); err == nil {
				<-stuck
			}
		},
		"cuts": func(r *mux.Request, _ wire.InterceptHeader) {
			if st, err := r.Accept(nil); err == nil {
				st.Reset()
			}
		},
	} {
		w := startAlone(t, sayApp)
		w.mgr.set(take)
		w.table(w.mgr.up(), tapEntry("a"))
		began := time.Now()
		if got := w.talk("short"); got != "app\nshortbye from app" || time.Since(began) >= acceptTimeout {
			t.Errorf("%s: the client got %q after %s", name, got, time.Since(began))
		}
		for range 3 { // more than any queue holds: the end would never come if the original waited for the copy
			if got := w.talk(text); got != "app\n"+text+"bye from app" {
				t.Fatalf("%s: the client got %d bytes", name, len(got))
			}
		}
		w.mgr.down()
		if got := w.talk("alone"); got != "app\nalonebye from app" {
			t.Errorf("%s, without a manager: %q", name, got)
		}
	}
}

// startAlone is start for a test with several worlds.
func startAlone(t testing.TB, app func(*net.TCPConn)) *world {
	t.Helper()
	w := &world{t: t, app: newApp(t, app), mgr: newManager(t), done: make(chan error, 1)}
	w.cfg = portConfig(t, w)
	w.run()
	return w
}

// Requests that match are copied whole, one after the other on one connection; the others are not.
func TestWiretapByRequest(t *testing.T) {
	for _, version := range []int{1, 2} {
		t.Run(fmt.Sprint("HTTP/", version), func(t *testing.T) {
			w := startBefore(t, newApp(t, func(c *net.TCPConn) { serveBoth(c, "app") }), false)
			var mu sync.Mutex
			var seen []string
			flows := 0
			w.mgr.set(func(r *mux.Request, h wire.InterceptHeader) {
				st, err := r.Accept(nil)
				if err != nil {
					return
				}
				mu.Lock()
				flows++
				mu.Unlock()
				serveHandler(st, http.HandlerFunc(func(rw http.ResponseWriter, r *http.Request) {
					b, err := io.ReadAll(r.Body)
					mu.Lock()
					defer mu.Unlock()
					seen = append(seen, fmt.Sprintf("%s %s %s %d %v %v", r.Method, r.URL, r.Host, len(b), r.Trailer, err))
					rw.WriteHeader(http.StatusTeapot)
				}))
			})
			tap := byHeader("a", "lou")
			tap.Wiretap = true
			w.table(w.mgr.up(), tap)
			tr := &http.Transport{MaxConnsPerHost: 1, Protocols: new(http.Protocols)}
			tr.Protocols.SetHTTP1(version == 1)
			tr.Protocols.SetUnencryptedHTTP2(version == 2)
			c := &http.Client{Transport: tr, Timeout: deadline}
			t.Cleanup(c.CloseIdleConnections)
			body := bytes.Repeat([]byte("b"), 100_000)
			host := fmt.Sprintf("127.0.0.1:%d", w.cfg.Ports[0].AgentPort)
			for i, r := range []struct{ user, method, path string }{
				{"lou", "GET", "/a?b=c"}, {"may", "POST", "/no"}, {"lou", "POST", "/sized"}, {"lou", "PUT", "/chunked"}, {"", "GET", "/no"}, {"lou", "GET", "/z"},
			} {
				req, err := http.NewRequest(r.method, "http://"+host+r.path, nil)
				if err != nil {
					t.Fatal(err)
				}
				if r.method != "GET" {
					req.Body = io.NopCloser(bytes.NewReader(body))
					if req.ContentLength = int64(len(body)); r.method == "PUT" {
						req.ContentLength = -1
						req.Trailer = http.Header{"X-Sum": {"42"}}
					}
				}
				req.Header.Set("X-User", r.user)
				resp, err := c.Do(req)
				if err != nil {
					t.Fatal(err)
				}
				b, _ := io.ReadAll(resp.Body)
				_ = resp.Body.Close()
				if got := string(b); resp.StatusCode != http.StatusOK || got != "app "+strings.Split(r.path, "?")[0] {
					t.Errorf("request %d was answered %d %q", i, resp.StatusCode, got)
				}
			}
			w.until("four requests were copied", func() bool { mu.Lock(); defer mu.Unlock(); return len(seen) == 4 })
			mu.Lock()
			defer mu.Unlock()
			want := map[string]bool{
				"GET /a?b=c " + host + " 0 map[] <nil>": true, "POST /sized " + host + " 100000 map[] <nil>": true,
				"PUT /chunked " + host + " 100000 map[X-Sum:[42]] <nil>": true, "GET /z " + host + " 0 map[] <nil>": true,
			}
			for _, s := range seen {
				if !want[s] {
					t.Errorf("copied: %s", s)
				}
				delete(want, s)
			}
			if wantFlows := map[int]int{1: 1, 2: 4}[version]; len(want) != 0 || flows != wantFlows {
				t.Errorf("not copied: %v; %d flows, want %d", want, flows, wantFlows)
			}
		})
	}
}

// Datagrams are copied as they are; what a wiretap's laptop answers, or refuses, reaches nobody.
func TestWiretapUDP(t *testing.T) {
	w, port := startUDP(t, "127.0.0.1")
	var mu sync.Mutex
	got := map[string][]string{}
	w.mgr.set(func(r *mux.Request, h wire.InterceptHeader) {
		if h.Intercept == "refuses" {
			_ = r.Reject(wire.CodeRefused, "")
			return
		}
		st, err := r.Accept(nil)
		if err != nil {
			return
		}
		for b := make([]byte, maxDatagram); ; {
			n, err := st.ReadPacket(b)
			if err != nil {
				return
			}
			mu.Lock()
			got[h.Src.String()] = append(got[h.Src.String()], string(b[:n]))
			mu.Unlock()
			_ = st.WritePacket([]byte("nobody reads this"))
		}
	})
	s := w.mgr.up()
	entry := func(uid string) control.TableEntry {
		return control.TableEntry{Intercept: uid, Protocol: "UDP", ContainerPort: port.ContainerPort, Wiretap: true}
	}
	w.tableOf(s, entry("a"), entry("refuses"))
	c, other := w.client(port), w.client(port)
	for _, text := range []string{"one", "", strings.Repeat("x", 20000)} {
		if got := w.asks(c, text); got != "app:"+text {
			t.Errorf("the client got %.20q", got)
		}
	}
	w.asks(other, "two")
	all := func(of net.Conn) string {
		mu.Lock()
		defer mu.Unlock()
		return strings.Join(got[of.LocalAddr().String()], "|")
	}
	w.until("the copies came", func() bool { return strings.HasSuffix(all(c), "xxx") && all(other) != "" })
	if got := all(c); !strings.HasPrefix(got, "one|") || !strings.Contains(got, "||") || strings.Contains(got, "two") {
		t.Errorf("copied %.50q", got)
	}
	w.tableOf(s)
	before := all(c)
	w.asks(c, "after")
	if got := all(c); got != before {
		t.Error("copied after the wiretap")
	}
}

// tapUDP has all datagrams of a UDP port that nobody serves copied to a laptop that takes them, in a bubble of synctest. opened counts the copies.
func tapUDP(t *testing.T, p *udpPort, a *Agent) (datagram func(client int), opened *atomic.Int32) {
	t.Helper()
	opened = new(atomic.Int32)
	ours, theirs, _ := muxtest.Pair(t, muxtest.Config{}, mux.Config{}, mux.Config{})
	a.up = &uplink{link: tunnel.NewLink(tunnel.LinkConfig{Dial: func(context.Context, *mux.Session) (*mux.Session, wire.HelloReply, error) {
		return ours, wire.HelloReply{}, nil
	}})}
	ctx, cancel := context.WithCancel(t.Context())
	var wg, copies sync.WaitGroup
	t.Cleanup(wg.Wait)
	t.Cleanup(copies.Wait)
	t.Cleanup(cancel)
	wg.Go(func() { _ = a.up.link.Run(ctx) })
	wg.Go(func() {
		for {
			r, err := theirs.Accept(ctx)
			if err != nil {
				return
			}
			st, err := r.Accept(nil)
			if err != nil {
				continue
			}
			opened.Add(1)
			wg.Go(func() {
				for {
					if _, err := st.ReadPacket(make([]byte, 1)); err != nil {
						_ = st.Close()
						return
					}
				}
			})
		}
	})
	a.table.set(control.Table{Items: []control.TableEntry{{Intercept: "a", Protocol: "UDP", Wiretap: true}}}, slog.New(slog.DiscardHandler))
	synctest.Wait()
	return func(client int) { p.copy(ctx, a, stranger(client), []byte("x"), &copies) }, opened
}

// A wiretap of a port whose clients ask one question each goes on to see new ones: who has been idle longest makes room, and a question is soon forgotten.
func TestWiretapUDPManyClients(t *testing.T) {
	p, a := bareUDP(t)
	synctest.Test(t, func(t *testing.T) {
		datagram, opened := tapUDP(t, p, a)
		for i := range maxTalks {
			datagram(i)
		}
		synctest.Wait()
		datagram(0) // goes on
		for i := range 3 {
			datagram(maxTalks + i)
		}
		synctest.Wait()
		left := func() (known, running int) {
			p.mu.Lock()
			defer p.mu.Unlock()
			return len(p.copies), p.copying
		}
		if known, running := left(); opened.Load() != maxTalks+3 || known != maxTalks || running != maxTalks {
			t.Errorf("%d were copied, %d are remembered, %d run", opened.Load(), known, running)
		}
		p.mu.Lock()
		for i, want := range map[int]bool{0: true, 1: false, 2: false, 3: false, 4: true, maxTalks: true} {
			if p.copies[copyKey{"a", stranger(i)}] != nil != want {
				t.Errorf("client %d: remembered %t", i, !want)
			}
		}
		p.mu.Unlock()
		time.Sleep(questionIdle)
		synctest.Wait()
		if known, running := left(); known != 1 || running != 1 || a.copies.bytes.Load() != 0 {
			t.Errorf("%d are remembered after a while, %d run, with %d bytes", known, running, a.copies.bytes.Load())
		}
		time.Sleep(tunnel.UDPIdle)
		synctest.Wait()
		if known, running := left(); known != 0 || running != 0 {
			t.Errorf("%d are remembered at the end, %d run", known, running)
		}
	})
}

// BenchmarkStalledWiretap compares an upload through an agent while a wiretap's laptop takes nothing with the same without a wiretap. They take
// turns, and the median of the ratios is reported: of-untapped is 1 if such a laptop costs nothing.
func BenchmarkStalledWiretap(b *testing.B) {
	const size = 64 << 20
	stuck := make(chan struct{})
	defer close(stuck)
	var addrs [2]string
	for i := range addrs {
		w := startAlone(b, func(c *net.TCPConn) {
			defer c.Close()
			_, _ = io.Copy(io.Discard, c)
			_, _ = c.Write([]byte("."))
		})
		w.mgr.set(func(r *mux.Request, _ wire.InterceptHeader) {
			if _, err := r.Accept(nil); err == nil {
				<-stuck
			}
		})
		if s := w.mgr.up(); i == 1 {
			w.table(s, tapEntry("a"))
		}
		addrs[i] = fmt.Sprintf("127.0.0.1:%d", w.cfg.Ports[0].AgentPort)
	}
	data := make([]byte, 1<<20)
	upload := func(addr string) float64 {
		began := time.Now()
		c, err := net.Dial("tcp", addr)
		if err != nil {
			b.Fatal(err)
		}
		defer c.Close()
		for range size / len(data) {
			if _, err := c.Write(data); err != nil {
				b.Fatal(err)
			}
		}
		_ = c.(*net.TCPConn).CloseWrite()
		if _, err := io.ReadFull(c, make([]byte, 1)); err != nil {
			b.Fatal(err)
		}
		return float64(time.Since(began))
	}
	var ratios []float64
	var rate float64
	for b.Loop() {
		first := len(ratios) % 2
		var took [2]float64
		took[first] = upload(addrs[first])
		took[1-first] = upload(addrs[1-first])
		ratios = append(ratios, took[0]/took[1])
		rate = max(rate, size/took[1]*1e3)
	}
	slices.Sort(ratios)
	b.ReportMetric(ratios[len(ratios)/2], "of-untapped")
	b.ReportMetric(rate, "MB/s")
}
