package main

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"os"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"golang.org/x/net/dns/dnsmessage"
)

// values are what one measurement gives, by the name of the quantity: "gbit/s", "/s", "p50 ms", "p99 ms", "loss %", "bytes", "done": how many there were.
type values map[string]float64

// job is one measurement, as it is asked of a client.
type job struct {
	work   string
	addr   string
	conns  int
	length time.Duration
	header string // a field of each HTTP request
	name   string // of a DNS question; "*." before it: a new name each time
	dial   dialer
}

// works are the measurements by name.
var works = map[string]func(*job) (values, error){
	"up": up, "down": down, "get": get, "http": requests, "open": open, "ping": ping, "loaded-down": loaded(portSource), "loaded-up": loaded(portSink),
	"udp": udpWindow, "udp-loss": udpPaced, "dns": lookups, "hold": hold, "until": until,
}

func client(_ context.Context, args []string) error {
	j := &job{}
	f := flag.NewFlagSet("client", flag.ContinueOnError)
	f.StringVar(&j.work, "work", "", "what to measure")
	f.StringVar(&j.addr, "addr", "127.0.0.1", "where the server is")
	f.IntVar(&j.conns, "conns", 1, "connections at once")
	f.DurationVar(&j.length, "for", time.Second, "how long")
	f.StringVar(&j.header, "header", "", "a header field of each request")
	f.StringVar(&j.name, "name", "", "the name to look up, or the answer to wait for")
	add := f.Int("add", 0, "how much higher the server's ports are")
	rawFile := f.String("raw", "", "go through the API server as this file says")
	useTLS := f.Bool("tls", false, "use the ports with TLS")
	if err := f.Parse(args); err != nil {
		return err
	}
	work := works[j.work]
	if work == nil {
		return fmt.Errorf("no such work: %q", j.work)
	}
	j.dial = plain(j.addr, *add)
	if *useTLS {
		j.dial = plainTLS(j.addr)
	}
	if *rawFile != "" {
		var err error
		if j.dial, err = raw(*rawFile); err != nil {
			return err
		}
	}
	v, err := work(j)
	if err != nil {
		return fmt.Errorf("%s: %w", j.work, err)
	}
	return json.NewEncoder(os.Stdout).Encode(v)
}

// all opens the job's connections to a port, before anything is measured.
func (j *job) all(port int) ([]net.Conn, error) {
	conns := make([]net.Conn, j.conns)
	for i := range conns {
		c, err := j.dial(port)
		if err != nil {
			return nil, err
		}
		conns[i] = c
	}
	return conns, nil
}

// up counts what the server has received: it says so itself after the client's end, if the way passes that on, which the raw one does not.
func up(j *job) (values, error) {
	conns, err := j.all(portSink)
	if err != nil {
		return nil, err
	}
	return move(conns, j.length, func(c net.Conn, b []byte) (int, error) { return c.Write(b) })
}

func down(j *job) (values, error) {
	conns, err := j.all(portSource)
	if err != nil {
		return nil, err
	}
	return move(conns, j.length, func(c net.Conn, b []byte) (int, error) { return c.Read(b) })
}

// get is down, as one answer of HTTP.
func get(j *job) (values, error) {
	conns, err := j.all(portHTTP)
	if err != nil {
		return nil, err
	}
	for _, c := range conns {
		if _, err := c.Write(j.request("/bytes")); err != nil {
			return nil, err
		}
	}
	return move(conns, j.length, func(c net.Conn, b []byte) (int, error) { return c.Read(b) })
}

// move has all connections moved for a while. What fills buffers in the first quarter is not counted.
func move(conns []net.Conn, length time.Duration, step func(net.Conn, []byte) (int, error)) (values, error) {
	var total atomic.Int64
	ended := make(chan error, len(conns))
	for _, c := range conns {
		go func() {
			b := make([]byte, block)
			for {
				n, err := step(c, b)
				total.Add(int64(n))
				if err != nil {
					ended <- err
					return
				}
			}
		}()
	}
	pause := func(d time.Duration) error {
		select {
		case err := <-ended:
			return err
		case <-time.After(d):
			return nil
		}
	}
	if err := pause(length / 4); err != nil {
		return nil, err
	}
	from, began := total.Load(), time.Now()
	if err := pause(length); err != nil {
		return nil, err
	}
	moved, took := total.Load()-from, time.Since(began)
	return values{"gbit/s": float64(moved) * 8 / took.Seconds() / 1e9, "bytes": float64(total.Load())}, nil
}

func (j *job) request(path string) []byte {
	h := ""
	if j.header != "" {
		h = j.header + "\r\n"
	}
	return []byte("GET " + path + " HTTP/1.1\r\nHost: bench\r\n" + h + "\r\n")
}

// times collects how long things took.
type times struct {
	mu  sync.Mutex
	all []time.Duration
}

func (t *times) add(ds []time.Duration) {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.all = append(t.all, ds...)
}

// values are the rate and two quantiles.
func (t *times) values(took time.Duration) (values, error) {
	if len(t.all) == 0 {
		return nil, errors.New("nothing was done in time")
	}
	slices.Sort(t.all)
	at := func(q float64) float64 { return float64(t.all[int(q*float64(len(t.all)-1))].Microseconds()) / 1000 }
	return values{"/s": float64(len(t.all)) / took.Seconds(), "done": float64(len(t.all)), "p50 ms": at(.5), "p99 ms": at(.99)}, nil
}

// repeat does step again and again on each connection, or of each worker, for the job's length.
func (j *job) repeat(step func(i int) error) (values, error) {
	var all times
	failed := make(chan error, j.conns)
	began := time.Now()
	var wg sync.WaitGroup
	for i := range j.conns {
		wg.Go(func() {
			var mine []time.Duration
			defer func() { all.add(mine) }()
			for time.Since(began) < j.length {
				from := time.Now()
				if err := step(i); err != nil {
					failed <- err
					return
				}
				mine = append(mine, time.Since(from))
			}
		})
	}
	wg.Wait()
	select {
	case err := <-failed:
		return nil, err
	default:
		return all.values(time.Since(began))
	}
}

// asker is an HTTP connection that costs next to nothing on the client's side.
type asker struct {
	c   net.Conn
	r   *bufio.Reader
	req []byte
}

func (j *job) asker(c net.Conn) *asker { return &asker{c, bufio.NewReader(c), j.request("/")} }

// ask sends the request and reads the answer.
func (a *asker) ask() (body string, err error) {
	_ = a.c.SetDeadline(time.Now().Add(dialTimeout))
	if _, err := a.c.Write(a.req); err != nil {
		return "", err
	}
	length := 0
	for {
		line, err := a.r.ReadSlice('\n')
		if err != nil {
			return "", err
		}
		if len(line) <= 2 {
			break
		}
		if k, v, _ := strings.Cut(string(line), ":"); strings.EqualFold(k, "Content-Length") {
			if length, err = strconv.Atoi(strings.TrimSpace(v)); err != nil {
				return "", err
			}
		}
	}
	b := make([]byte, length)
	_, err = io.ReadFull(a.r, b)
	return string(b), err
}

// requests is HTTP on connections that stay.
func requests(j *job) (values, error) {
	conns, err := j.all(portHTTP)
	if err != nil {
		return nil, err
	}
	askers := make([]*asker, len(conns))
	for i, c := range conns {
		askers[i] = j.asker(c)
		if _, err := askers[i].ask(); err != nil {
			return nil, err
		}
	}
	return j.repeat(func(i int) error { _, err := askers[i].ask(); return err })
}

// open makes connections: each one is used for a byte and closed. "connect p50 ms" is without that byte.
func open(j *job) (values, error) {
	connects := make([][]time.Duration, j.conns)
	v, err := j.repeat(func(i int) error {
		from := time.Now()
		c, err := j.dial(portEcho)
		if err != nil {
			return err
		}
		defer c.Close()
		connects[i] = append(connects[i], time.Since(from))
		return bounce(c, make([]byte, 1))
	})
	if err != nil {
		return nil, err
	}
	all := slices.Concat(connects...)
	slices.Sort(all)
	v["connect p50 ms"] = float64(all[len(all)/2].Microseconds()) / 1000
	return v, nil
}

func bounce(c net.Conn, b []byte) error {
	_ = c.SetDeadline(time.Now().Add(dialTimeout))
	if _, err := c.Write(b); err != nil {
		return err
	}
	_, err := io.ReadFull(c, b)
	return err
}

// ping sends 100 bytes to and fro.
func ping(j *job) (values, error) {
	conns, err := j.all(portEcho)
	if err != nil {
		return nil, err
	}
	return j.repeat(func(i int) error { return bounce(conns[i], make([]byte, 100)) })
}

// loaded is a small request again and again while a flow takes all there is.
func loaded(port int) func(*job) (values, error) {
	return func(j *job) (values, error) {
		bulk, err := j.dial(port)
		if err != nil {
			return nil, err
		}
		go func() {
			b := make([]byte, block)
			for err := error(nil); err == nil; {
				if port == portSink {
					_, err = bulk.Write(b)
				} else {
					_, err = bulk.Read(b)
				}
			}
		}()
		defer bulk.Close()
		c, err := j.dial(portHTTP)
		if err != nil {
			return nil, err
		}
		a := j.asker(c)
		for began := time.Now(); time.Since(began) < j.length/4; {
			if _, err := a.ask(); err != nil {
				return nil, err
			}
		}
		return j.repeat(func(int) error { _, err := a.ask(); return err })
	}
}

const datagram = 200 // bytes

// udpWindow keeps 64 datagrams on their way and counts those that come back.
func udpWindow(j *job) (values, error) {
	c, err := net.Dial("udp", net.JoinHostPort(j.addr, fmt.Sprint(portEcho)))
	if err != nil {
		return nil, err
	}
	defer c.Close()
	sent, got := 0, 0
	b := make([]byte, 64<<10)
	began := time.Now()
	for time.Since(began) < j.length {
		for sent-got < 64 {
			if _, err := c.Write(b[:datagram]); err != nil {
				return nil, err
			}
			sent++
		}
		_ = c.SetReadDeadline(time.Now().Add(200 * time.Millisecond))
		_, err := c.Read(b)
		if errors.Is(err, os.ErrDeadlineExceeded) {
			sent = got // those are lost
			continue
		}
		if err != nil {
			return nil, err
		}
		got++
	}
	return values{"/s": float64(got) / time.Since(began).Seconds()}, nil
}

// udpPaced sends 2,000 datagrams a second, in portions of 2 ms, and tells how many do not come back.
func udpPaced(j *job) (values, error) {
	const every, portion = 2 * time.Millisecond, 4
	c, err := net.Dial("udp", net.JoinHostPort(j.addr, fmt.Sprint(portEcho)))
	if err != nil {
		return nil, err
	}
	defer c.Close()
	var got atomic.Int64
	go func() {
		b := make([]byte, 64<<10)
		for {
			if _, err := c.Read(b); err != nil {
				return
			}
			got.Add(1)
		}
	}()
	sent := 0
	tick := time.NewTicker(every)
	defer tick.Stop()
	for began := time.Now(); time.Since(began) < j.length; {
		<-tick.C
		for range portion {
			if _, err := c.Write(make([]byte, datagram)); err != nil {
				return nil, err
			}
			sent++
		}
	}
	time.Sleep(500 * time.Millisecond) // what is on its way
	return values{"loss %": 100 * (1 - float64(got.Load())/float64(sent)), "sent": float64(sent)}, nil
}

// lookups asks the resolver of resolv.conf for addresses.
func lookups(j *job) (values, error) {
	server, err := resolver()
	if err != nil {
		return nil, err
	}
	conns := make([]net.Conn, j.conns)
	for i := range conns {
		if conns[i], err = net.Dial("udp", server.String()); err != nil {
			return nil, err
		}
	}
	fresh, always := strings.CutPrefix(j.name, "*.")
	return j.repeat(func(i int) error {
		name := fresh
		if always {
			name = fmt.Sprintf("n%d.%s", rand.Uint64(), fresh)
		}
		return lookup(conns[i], name)
	})
}

func lookup(c net.Conn, name string) error {
	n, err := dnsmessage.NewName(name)
	if err != nil {
		return err
	}
	id := uint16(rand.Uint32())
	q := dnsmessage.Message{
		Header:    dnsmessage.Header{ID: id, RecursionDesired: true},
		Questions: []dnsmessage.Question{{Name: n, Type: dnsmessage.TypeA, Class: dnsmessage.ClassINET}},
	}
	b, err := q.Pack()
	if err != nil {
		return err
	}
	if _, err := c.Write(b); err != nil {
		return err
	}
	_ = c.SetReadDeadline(time.Now().Add(5 * time.Second))
	answer := make([]byte, 4<<10)
	for {
		k, err := c.Read(answer)
		if err != nil {
			return err
		}
		if k > 2 && answer[0] == b[0] && answer[1] == b[1] {
			return nil
		}
	}
}

// hold opens connections and keeps them, used once, until standard input ends. It says how long it took before it waits.
func hold(j *job) (values, error) {
	limit := syscall.Rlimit{Cur: uint64(j.conns) + 100, Max: uint64(j.conns) + 100}
	var have syscall.Rlimit
	if err := syscall.Getrlimit(syscall.RLIMIT_NOFILE, &have); err != nil {
		return nil, err
	}
	if limit.Max = max(limit.Max, have.Max); have.Cur < limit.Cur {
		if err := syscall.Setrlimit(syscall.RLIMIT_NOFILE, &limit); err != nil {
			return nil, err
		}
	}
	conns := make([]net.Conn, j.conns)
	began := time.Now()
	var first atomic.Int64 // when a thousand were there
	err := each(len(conns), func(i int) error {
		c, err := j.dial(portEcho)
		if err == nil {
			err = bounce(c, make([]byte, 8))
		}
		if conns[i] = c; i == min(1000, len(conns))-1 {
			first.Store(int64(time.Since(began)))
		}
		return err
	})
	if err != nil {
		return nil, err
	}
	if err := json.NewEncoder(os.Stdout).Encode(values{"s": time.Since(began).Seconds(), "1000 s": time.Duration(first.Load()).Seconds()}); err != nil {
		return nil, err
	}
	_, _ = io.Copy(io.Discard, os.Stdin)
	if err := each(len(conns), func(i int) error { return bounce(conns[i], make([]byte, 8)) }); err != nil {
		return nil, fmt.Errorf("after a while: %w", err)
	}
	for _, c := range conns { // reset: closed in order they would keep the manager's ports for a minute, and the next round would look long for others
		if tcp, ok := c.(*net.TCPConn); ok {
			_ = tcp.SetLinger(0)
		}
		_ = c.Close()
	}
	return values{"alive": float64(len(conns))}, nil
}

// each does something for each of n connections, 64 at once, in their order.
func each(n int, do func(i int) error) error {
	var next atomic.Int64
	failed := make(chan error, 64)
	var wg sync.WaitGroup
	for range 64 {
		wg.Go(func() {
			for i := int(next.Add(1)) - 1; i < n; i = int(next.Add(1)) - 1 {
				if err := do(i); err != nil {
					failed <- fmt.Errorf("connection %d: %w", i, err)
					return
				}
			}
		})
	}
	wg.Wait()
	select {
	case err := <-failed:
		return err
	default:
		return nil
	}
}

// until asks on new connections until the answer is a certain one, and says when that was (Unix time, in ms).
func until(j *job) (values, error) {
	for began := time.Now(); time.Since(began) < j.length; time.Sleep(5 * time.Millisecond) { // what asks all the time is in the way of what it waits for
		c, err := j.dial(portHTTP)
		if err != nil {
			continue // the workload may be restarting
		}
		body, err := j.asker(c).ask()
		_ = c.Close()
		if err == nil && body == j.name {
			return values{"at ms": float64(time.Now().UnixMicro()) / 1000}, nil
		}
	}
	return nil, fmt.Errorf("%q did not answer within %v", j.name, j.length)
}
