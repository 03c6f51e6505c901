package httproute

import (
	"bufio"
	"bytes"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"net/http"
	"strings"
	"testing"
	"time"

	"github.com/doppel-dev/doppel/internal/flow"
)

func request(method, path, id, rest string) string {
	s := method + " " + path + " HTTP/1.1\r\nHost: h\r\n"
	if id != "" {
		s += "X-Id: " + id + "\r\n"
	}
	return s + rest
}

func get1(path, id string) string { return request("GET", path, id, "\r\n") }

// TestPerRequest sends requests for three places over one connection, one after the other and all at once.
func TestPerRequest(t *testing.T) {
	w := newWorld(t)
	w.at(App, httpServer(t, "app"))
	w.rule("lou", httpServer(t, "lou"))
	w.rule("may", httpServer(t, "may"))
	type step struct{ send, method, want string }
	steps := []step{
		{get1("/1", ""), "GET", "app /1 0"},
		{get1("/2", "lou"), "GET", "lou /2 0"},
		{request("POST", "/3", "lou", "Content-Length: 5\r\n\r\nhello"), "POST", "lou /3 5"},
		{request("POST", "/4", "may", "Transfer-Encoding: chunked\r\n\r\n5;x=y\r\nhello\r\n1\r\n!\r\n0\r\nT: 1\r\n\r\n"), "POST", "may /4 6"},
		{request("HEAD", "/5", "", "\r\n"), "HEAD", ""},
		{get1("/6", "nobody"), "GET", "app /6 0"},
		{request("GET", "/stream", "lou", "\r\n"), "GET", "lou 0\nlou 1\nlou 2\n"},
		{get1("/empty", "may"), "GET", ""},
		{get1("/empty", ""), "GET", ""},
		{request("PUT", "/7", "", "Transfer-Encoding: Chunked\r\n\r\n0\r\n\r\n"), "PUT", "app /7 0"},
		{request("POST", "/8", "", "Content-Length: 300000\r\n\r\n"+strings.Repeat("x", 300000)), "POST", "app /8 300000"},
		{request("POST", "/9", "may", "Content-Length: 300000\r\n\r\n"+strings.Repeat("x", 300000)), "POST", "may /9 300000"},
		{request("GET", "/early", "lou", "\r\n"), "GET", "lou"},
		{get1("/10", ""), "GET", "app /10 0"},
	}
	t.Run("in turn", func(t *testing.T) {
		c := w.dial()
		for _, s := range steps {
			c.send(s.send)
			check(t, c, s.method, s.want)
		}
	})
	t.Run("pipelined", func(t *testing.T) {
		c := w.dial()
		go func() {
			for _, s := range steps {
				if _, err := io.WriteString(c.TCPConn, s.send); err != nil {
					return
				}
			}
		}()
		for _, s := range steps {
			check(t, c, s.method, s.want)
		}
	})
	t.Run("byte by byte", func(t *testing.T) {
		c := w.dial()
		go func() {
			for _, s := range steps[:8] {
				for i := range s.send {
					if _, err := io.WriteString(c.TCPConn, s.send[i:i+1]); err != nil {
						return
					}
				}
			}
		}()
		for _, s := range steps[:8] {
			check(t, c, s.method, s.want)
		}
	})
	if n := w.opened("lou"); n != 3 {
		t.Errorf("%d connections to lou for three clients", n)
	}
}

func check(t *testing.T, c *client, method, want string) {
	t.Helper()
	status, body := c.answer(method)
	for status/100 == 1 {
		status, body = c.answer(method)
	}
	if status/100 != 2 || body != want {
		t.Fatalf("got %d %q, want %q", status, body, want)
	}
}

// TestNewAndEndedIntercepts changes who gets what while a connection is open.
func TestNewAndEndedIntercepts(t *testing.T) {
	w := newWorld(t)
	w.at(App, httpServer(t, "app"))
	c := w.dial()
	c.send(get1("/", "lou"))
	check(t, c, "GET", "app / 0")
	w.rule("lou", httpServer(t, "lou"))
	c.send(get1("/", "lou"))
	check(t, c, "GET", "lou / 0")
	w.forget("lou")
	c.send(get1("/", "lou"))
	check(t, c, "GET", "app / 0")
}

// TestLaptopDoesNotTake gives the app what a laptop refuses.
func TestLaptopDoesNotTake(t *testing.T) {
	w := newWorld(t)
	w.at(App, httpServer(t, "app"))
	w.rule("lou", "")
	c := w.dial()
	c.send(get1("/a", "lou") + get1("/b", ""))
	check(t, c, "GET", "app /a 0")
	check(t, c, "GET", "app /b 0")
	if w.opened(App) != 1 {
		t.Errorf("%d connections to the app", w.opened(App))
	}
}

// TestIdleLaptopLost loses a laptop between two requests, by a reset or because its process was ended: the client notices nothing.
func TestIdleLaptopLost(t *testing.T) {
	for _, reset := range []bool{true, false} {
		w := newWorld(t)
		w.at(App, httpServer(t, "app"))
		cut := make(chan struct{})
		gone := make(chan struct{})
		w.rule("lou", rawServer(t, func(c *net.TCPConn, r *bufio.Reader) {
			if _, err := http.ReadRequest(r); err != nil {
				return
			}
			io.WriteString(c, "HTTP/1.1 200 OK\r\nContent-Length: 3\r\n\r\nlou")
			<-cut
			if reset {
				c.SetLinger(0)
			}
			c.Close()
			close(gone)
		}))
		c := w.dial()
		c.send(get1("/", "lou"))
		check(t, c, "GET", "lou")
		w.rule("lou", "")
		close(cut)
		<-gone
		for range 20 { // until the loss is noticed
			c.send(get1("/", ""))
			check(t, c, "GET", "app / 0")
		}
		c.send(get1("/", "lou"))
		check(t, c, "GET", "app / 0")
	}
}

// TestLaptopCloses passes a laptop's FIN on where it belongs to the answer: the answer says so, or the request asked for it.
func TestLaptopCloses(t *testing.T) {
	for _, tt := range []struct{ ask, answer string }{
		{get1("/", "lou"), "HTTP/1.1 200 OK\r\nConnection: x, Close\r\nContent-Length: 3\r\n\r\nlou"},
		{get1("/", "lou"), "HTTP/1.0 200 OK\r\nContent-Length: 3\r\n\r\nlou"},
		{request("GET", "/", "lou", "Connection: close\r\n\r\n"), "HTTP/1.1 200 OK\r\nContent-Length: 3\r\n\r\nlou"},
		{"GET / HTTP/1.0\r\nX-Id: lou\r\n\r\n", "HTTP/1.1 200 OK\r\nContent-Length: 3\r\n\r\nlou"},
	} {
		w := newWorld(t)
		w.at(App, httpServer(t, "app"))
		w.rule("lou", rawServer(t, func(c *net.TCPConn, r *bufio.Reader) {
			http.ReadRequest(r)
			io.WriteString(c, tt.answer)
		}))
		c := w.dial()
		c.send(tt.ask)
		if got := c.rest(); got != tt.answer {
			t.Errorf("%q", got)
		}
	}
}

// TestBusyLaptopLost resets the client: its request may have been acted on.
func TestBusyLaptopLost(t *testing.T) {
	w := newWorld(t)
	w.at(App, httpServer(t, "app"))
	w.rule("lou", rawServer(t, func(c *net.TCPConn, r *bufio.Reader) {
		http.ReadRequest(r)
		c.SetLinger(0)
	}))
	c := w.dial()
	c.send(get1("/", "lou"))
	if b, err := io.ReadAll(c.r); err == nil {
		t.Fatalf("no error but %q", b)
	}
}

// TestSwitch lets WebSocket-like connections leave HTTP, for both places.
func TestSwitch(t *testing.T) {
	echo := func(name string) string {
		return rawServer(t, func(c *net.TCPConn, r *bufio.Reader) {
			for {
				req, err := http.ReadRequest(r)
				if err != nil {
					return
				}
				if req.URL.Path == "/no" {
					io.WriteString(c, "HTTP/1.1 426 No\r\nContent-Length: 0\r\n\r\n")
					continue
				}
				if req.Header.Get("Upgrade") == "" && req.Method != "CONNECT" {
					fmt.Fprintf(c, "HTTP/1.1 200 OK\r\nContent-Length: 3\r\n\r\n%s", name)
					continue
				}
				if req.Method == "CONNECT" {
					io.WriteString(c, "HTTP/1.1 200 OK\r\n\r\n"+name+":")
				} else {
					io.WriteString(c, "HTTP/1.1 101 Switching Protocols\r\nConnection: Upgrade\r\nUpgrade: x\r\n\r\n"+name+":")
				}
				io.Copy(c, r)
				c.CloseWrite()
				return
			}
		})
	}
	w := newWorld(t)
	w.at(App, echo("app"))
	w.rule("lou", echo("lou"))
	for _, id := range []string{"", "lou"} {
		name := id
		if id == "" {
			name = "app"
		}
		for _, ask := range []string{request("GET", "/", id, "Connection: Upgrade\r\nUpgrade: x\r\n\r\n"), strings.Replace(request("CONNECT", "h:1", id, "\r\n"), "CONNECT h:1", "CONNECT h:1", 1)} {
			c := w.dial()
			c.send(get1("/", "lou"))
			check(t, c, "GET", "lou")
			c.send(request("GET", "/no", id, "Connection: Upgrade\r\nUpgrade: x\r\n\r\n"))
			if s, _ := c.answer("GET"); s != 426 {
				t.Fatal(s)
			}
			// What follows looks like a request for the other place, and must not be taken for one.
			c.send(ask + get1("/", "lou"))
			c.CloseWrite()
			got := c.rest()
			if !strings.HasSuffix(got, "\r\n\r\n"+name+":"+get1("/", "lou")) {
				t.Errorf("%s: %q", name, got)
			}
		}
	}
}

// TestOfferOfHTTP2 has requests that offer to go on in HTTP/2: nobody hears of that, and the connection stays one of requests.
func TestOfferOfHTTP2(t *testing.T) {
	echo := func(name string) string {
		return rawServer(t, func(c *net.TCPConn, r *bufio.Reader) {
			for {
				var head strings.Builder
				for !strings.HasSuffix(head.String(), "\r\n\r\n") {
					line, err := r.ReadString('\n')
					if err != nil {
						return
					}
					head.WriteString(line)
				}
				if strings.Contains(head.String(), "websocket") {
					io.WriteString(c, "HTTP/1.1 101 Switching Protocols\r\n\r\n")
					io.Copy(c, r)
					return
				}
				body := name + " " + head.String()
				fmt.Fprintf(c, "HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n%s", len(body), body)
			}
		})
	}
	w := newWorld(t)
	w.at(App, echo("app"))
	w.rule("lou", echo("lou"))
	c := w.dial()
	for _, id := range []string{"may", "lou", "may"} {
		for _, offer := range []string{"Upgrade: h2c\r\nHTTP2-Settings: AAMAAABk\r\n", "HTTP2-Settings: AAMAAABk\r\nupgrade:\tH2C \r\n", "Upgrade: h2c, h2c\r\n", "Upgrade: h2c\r\nUpgrade: h2c\r\n"} {
			const around = "A: 1\r\n%sConnection: Upgrade, HTTP2-Settings\r\n\r\n"
			c.send(request("GET", "/", id, fmt.Sprintf(around, offer)))
			name := "app "
			if id == "lou" {
				name = "lou "
			}
			check(t, c, "GET", name+request("GET", "/", id, fmt.Sprintf(around, "")))
		}
	}
	c.send(request("GET", "/", "lou", "Upgrade: h2c, websocket\r\n\r\n"))
	if status, _ := c.answer("GET"); status != 101 {
		t.Fatal(status)
	}
	c.send(get1("/", ""))
	c.CloseWrite()
	if got := c.rest(); got != get1("/", "") {
		t.Errorf("%q", got)
	}
}

// TestNotHTTP passes on what is no HTTP as it is: to the app, or to whoever has the whole port.
func TestNotHTTP(t *testing.T) {
	banner := rawServer(t, func(c *net.TCPConn, r *bufio.Reader) {
		io.WriteString(c, "220 hello\r\n")
		io.Copy(c, r)
		c.CloseWrite()
	})
	echo := rawServer(t, func(c *net.TCPConn, r *bufio.Reader) {
		b, _ := io.ReadAll(r)
		c.Write(b)
	})
	junk := make([]byte, 200000)
	for i := range junk {
		junk[i] = byte(rand.Int())
	}
	junk[0] = 0x16
	for _, rest := range []string{App, "all"} {
		w := newWorld(t)
		w.rest = rest
		w.rule("lou", httpServer(t, "lou"))
		w.at(rest, echo)
		for _, s := range []string{string(junk), "*1\r\n$4\r\nPING\r\n", "get key\r\n", "GET /\r\n", "x", "GET / HTTP/1.1\r\nx-id: lou\r\n", "PRI * HTTP/3.0\r\n"} {
			c := w.dial()
			c.send(s)
			c.CloseWrite()
			if got := c.rest(); got != s {
				t.Errorf("%.30q came back as %.60q (%d of %d bytes)", s, got, len(got), len(s))
			}
		}
		w.at(rest, banner) // the server speaks first
		c := w.dial()
		if line, err := c.r.ReadString('\n'); err != nil || line != "220 hello\r\n" {
			t.Fatalf("%q %v", line, err)
		}
		c.send(get1("/", "lou"))
		c.CloseWrite()
		if got := c.rest(); got != get1("/", "lou") {
			t.Errorf("after the banner: %q", got)
		}
	}
}

// TestOdd sends what readers may understand in several ways: all of it and all that follows is the app's, byte for byte, and never a laptop's.
func TestOdd(t *testing.T) {
	smuggled := get1("/smuggled", "lou")
	odd := map[string]string{
		"length and coding":   request("POST", "/", "lou", "Content-Length: 4\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n"),
		"two lengths":         request("POST", "/", "lou", "Content-Length: 4\r\nContent-Length: 0\r\n\r\n"),
		"same length twice":   request("POST", "/", "lou", "Content-Length: 0\r\nContent-Length: 0\r\n\r\n"),
		"list of lengths":     request("POST", "/", "lou", "Content-Length: 0, 0\r\n\r\n"),
		"signed length":       request("POST", "/", "lou", "Content-Length: +0\r\n\r\n"),
		"huge length":         request("POST", "/", "lou", "Content-Length: 99999999999999999999\r\n\r\n"),
		"other coding":        request("POST", "/", "lou", "Transfer-Encoding: xchunked\r\n\r\n"),
		"coding in a list":    request("POST", "/", "lou", "Transfer-Encoding: gzip, chunked\r\n\r\n0\r\n\r\n"),
		"coding twice":        request("POST", "/", "lou", "Transfer-Encoding: chunked\r\nTransfer-Encoding: identity\r\n\r\n0\r\n\r\n"),
		"coding in 1.0":       "POST / HTTP/1.0\r\nX-Id: lou\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
		"blank before colon":  request("POST", "/", "lou", "Content-Length : 4\r\n\r\n"),
		"folded line":         request("POST", "/", "lou", "X: 1\r\n Content-Length: 4\r\n\r\n"),
		"bare line feed":      "GET / HTTP/1.1\nHost: h\nX-Id: lou\n\n",
		"bare line feed late": request("GET", "/", "lou", "X: 1\nY: 2\r\n\r\n"),
		"carriage return":     request("GET", "/", "lou", "X: 1\rY: 2\r\n\r\n"),
		"nul":                 request("GET", "/", "lou", "X: \x00\r\n\r\n"),
		"no name":             request("GET", "/", "lou", ": x\r\n\r\n"),
		"two hosts":           request("GET", "/", "lou", "Host: other\r\n\r\n"),
		"two blanks":          "GET  / HTTP/1.1\r\nX-Id: lou\r\n\r\n",
		"two empty lines":     "\r\n\r\n" + get1("/", "lou"),
		"version":             "GET / HTTP/1.2\r\nX-Id: lou\r\n\r\n",
		"lower version":       "GET / http/1.1\r\nX-Id: lou\r\n\r\n",
		"blank in target":     "GET /a b HTTP/1.1\r\nX-Id: lou\r\n\r\n",
		"long":                request("GET", "/", "lou", "X: "+strings.Repeat("x", MaxHead)+"\r\n\r\n"),
	}
	for name, s := range odd {
		for _, before := range []string{"", get1("/", "lou"), get1("/", "")} {
			t.Run(name, func(t *testing.T) {
				t.Parallel()
				var got bytes.Buffer
				w := newWorld(t)
				w.rule("lou", rawServer(t, func(c *net.TCPConn, r *bufio.Reader) {
					b, _ := http.ReadRequest(r)
					io.WriteString(c, "HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n")
					if rest, _ := io.ReadAll(r); len(rest) > 0 || b == nil || before == "" {
						t.Errorf("the laptop got %.80q", rest)
					}
				}))
				appDone := make(chan struct{})
				w.at(App, rawServer(t, func(c *net.TCPConn, r *bufio.Reader) {
					defer close(appDone)
					if before == get1("/", "") {
						http.ReadRequest(r)
						io.WriteString(c, "HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n")
					}
					io.Copy(&got, r)
				}))
				c := w.dial()
				c.send(before)
				if before != "" {
					c.answer("GET")
				}
				c.send(s + smuggled)
				c.CloseWrite()
				c.rest()
				<-appDone
				if got.String() != s+smuggled {
					t.Errorf("the app got %.80q", got.String())
				}
			})
		}
	}
}

// TestOddBody has an intercepted request whose body breaks the chunked coding: nothing that follows reaches the laptop.
func TestOddBody(t *testing.T) {
	for _, bad := range []string{"x\r\n", "5\r\nhello0\r\n\r\n", "5\nhello\r\n0\r\n\r\n", "\r\n", "-1\r\n", "ffffffffffffffff1\r\n", "0\r\n x\r\n\r\n", "1\r\nab\r\n"} {
		var got bytes.Buffer
		done := make(chan struct{})
		w := newWorld(t)
		w.at(App, httpServer(t, "app"))
		w.rule("lou", rawServer(t, func(c *net.TCPConn, r *bufio.Reader) {
			defer close(done)
			io.Copy(&got, r)
		}))
		head := request("POST", "/", "lou", "Transfer-Encoding: chunked\r\n\r\n")
		c := w.dial()
		c.send(head + bad + get1("/smuggled", ""))
		io.ReadAll(c.r)
		<-done
		if s := got.String(); strings.Contains(s, "smuggled") {
			t.Errorf("%q: the laptop got %q", bad, s)
		}
	}
}

// TestExpect has a client that waits for 100 Continue.
func TestExpect(t *testing.T) {
	w := newWorld(t)
	server := func(name string) string {
		return rawServer(t, func(c *net.TCPConn, r *bufio.Reader) {
			for {
				req, err := http.ReadRequest(r)
				if err != nil {
					return
				}
				if req.URL.Path == "/no" {
					fmt.Fprintf(c, "HTTP/1.1 417 No\r\nContent-Length: 0\r\n\r\n")
					b, _ := io.ReadAll(r)
					fmt.Fprintf(c, "HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n%s", len(b), b)
					return
				}
				if req.Header.Get("Expect") != "" {
					io.WriteString(c, "HTTP/1.1 100 Continue\r\n\r\n")
				}
				b, _ := io.ReadAll(req.Body)
				body := fmt.Sprintf("%s %d", name, len(b))
				fmt.Fprintf(c, "HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n%s", len(body), body)
			}
		})
	}
	w.at(App, server("app"))
	w.rule("lou", server("lou"))
	for _, id := range []string{"", "lou", ""} {
		name := id
		if id == "" {
			name = "app"
		}
		c := w.dial()
		c.send(request("POST", "/", id, "Expect: 100-continue\r\nContent-Length: 5\r\n\r\n"))
		if s, _ := c.answer("POST"); s != 100 {
			t.Fatal(s)
		}
		c.send("hello")
		check(t, c, "POST", name+" 5")
		c.send(get1("/", ""))
		check(t, c, "GET", "app 0")
	}
	// Refused, the client sends its next request instead of the body: the app sees what it would see without us.
	c := w.dial()
	c.send(request("POST", "/no", "", "Expect: 100-continue\r\nContent-Length: 5\r\n\r\n"))
	if s, _ := c.answer("POST"); s != 417 {
		t.Fatal(s)
	}
	c.send(get1("/", "lou"))
	c.CloseWrite()
	check(t, c, "GET", get1("/", "lou"))
	// The same from a laptop: it gets nothing more.
	c = w.dial()
	c.send(request("POST", "/no", "lou", "Expect: 100-continue\r\nContent-Length: 5\r\n\r\n"))
	if s, _ := c.answer("POST"); s != 417 {
		t.Fatal(s)
	}
	c.send(get1("/", ""))
	if b, err := io.ReadAll(c.r); err == nil && strings.Contains(string(b), "GET") {
		t.Errorf("the laptop got the next request: %q", b)
	}
}

// lingering is a stream that returns from writing a body only when its answer has come.
type lingering struct {
	flow.Stream
	answered chan struct{}
}

func (l *lingering) Write(p []byte) (int, error) {
	n, err := l.Stream.Write(p)
	if strings.HasSuffix(string(p), "hello") {
		<-l.answered
	}
	return n, err
}

// TestExpectAnsweredAtOnce has a body that waited for 100 Continue, or did not wait, answered before we know that it was sent.
func TestExpectAnsweredAtOnce(t *testing.T) {
	for _, wait := range []bool{true, false} {
		w := newWorld(t)
		w.at(App, httpServer(t, "app"))
		w.rule("lou", httpServer(t, "lou"))
		answered := make(chan struct{})
		w.wrap = func(s flow.Stream) flow.Stream { return &lingering{s, answered} }
		c := w.dial()
		head := request("POST", "/", "", "Expect: 100-continue\r\nContent-Length: 5\r\n\r\n")
		if wait {
			c.send(head)
			if s, _ := c.answer("POST"); s != 100 {
				t.Fatal(s)
			}
			c.send("hello")
		} else {
			c.send(head + "hello")
		}
		check(t, c, "POST", "app / 5")
		close(answered)
		c.send(get1("/", "lou"))
		check(t, c, "GET", "lou / 0")
	}
}

// TestUntilClose has answers that end with the connection.
func TestUntilClose(t *testing.T) {
	server := func(name string) string {
		return rawServer(t, func(c *net.TCPConn, r *bufio.Reader) {
			http.ReadRequest(r)
			io.WriteString(c, "HTTP/1.0 200 OK\r\n\r\n"+name)
		})
	}
	w := newWorld(t)
	w.at(App, server("app"))
	w.rule("lou", server("lou"))
	for _, id := range []string{"", "lou"} {
		c := w.dial()
		c.send("GET / HTTP/1.0\r\nX-Id: " + id + "\r\n\r\n")
		name := id
		if id == "" {
			name = "app"
		}
		if got := c.rest(); got != "HTTP/1.0 200 OK\r\n\r\n"+name {
			t.Errorf("%q", got)
		}
	}
}

// TestServerCloses passes the app's FIN on when it closes an idle connection, and its words before that.
func TestServerCloses(t *testing.T) {
	w := newWorld(t)
	w.rule("lou", httpServer(t, "lou"))
	w.at(App, rawServer(t, func(c *net.TCPConn, r *bufio.Reader) {
		http.ReadRequest(r)
		io.WriteString(c, "HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n")
		io.WriteString(c, "HTTP/1.1 408 Request Timeout\r\nConnection: close\r\nContent-Length: 0\r\n\r\n")
	}))
	c := w.dial()
	c.send(get1("/", ""))
	if got := c.rest(); !strings.HasSuffix(got, "HTTP/1.1 408 Request Timeout\r\nConnection: close\r\nContent-Length: 0\r\n\r\n") {
		t.Errorf("%q", got)
	}
}

// TestByteForByte sends random well-formed traffic to the app: it must arrive as it was sent.
func TestByteForByte(t *testing.T) {
	r := rand.New(rand.NewPCG(5, 6))
	for range 30 {
		var sent strings.Builder
		n := 1 + r.IntN(20)
		for range n {
			sent.WriteString(randomRequest(r))
		}
		var got bytes.Buffer
		done := make(chan struct{})
		w := newWorld(t)
		w.rule("lou", httpServer(t, "lou"))
		w.at(App, rawServer(t, func(c *net.TCPConn, br *bufio.Reader) {
			defer close(done)
			tee := bufio.NewReader(io.TeeReader(br, &got))
			for {
				if b, _ := tee.Peek(1); len(b) == 1 && b[0] == '\r' {
					tee.Discard(2)
				}
				req, err := http.ReadRequest(tee)
				if err != nil {
					return
				}
				io.Copy(io.Discard, req.Body)
				io.WriteString(c, "HTTP/1.1 204 No Content\r\n\r\n")
			}
		}))
		c := w.dial()
		go func() {
			io.WriteString(c.TCPConn, sent.String())
			c.CloseWrite()
		}()
		if back := c.rest(); strings.Count(back, "204") != n {
			t.Fatalf("%d answers to %d requests", strings.Count(back, "204"), n)
		}
		<-done
		if got.String() != sent.String() {
			t.Fatalf("sent %q\ngot %q", sent.String(), got.String())
		}
	}
}

func randomRequest(r *rand.Rand) string {
	var b strings.Builder
	if r.IntN(8) == 0 {
		b.WriteString("\r\n") // RFC 9112, section 2.2
	}
	b.WriteString([]string{"GET", "POST", "PUT", "X-ODD"}[r.IntN(4)] + " /" + strings.Repeat("p", r.IntN(20)) + "?q=1 HTTP/1.1\r\nHost: h\r\n")
	for range r.IntN(5) {
		fmt.Fprintf(&b, "h%d:%s%s%s\r\n", r.IntN(9), strings.Repeat(" ", r.IntN(3)), strings.Repeat("v", r.IntN(9000)), strings.Repeat("\t", r.IntN(2)))
	}
	switch r.IntN(3) {
	case 0:
		n := r.IntN(100000)
		fmt.Fprintf(&b, "Content-Length: %d\r\n\r\n%s", n, strings.Repeat("b", n))
	case 1:
		b.WriteString("Transfer-Encoding: chunked\r\n\r\n")
		for range r.IntN(5) {
			n := 1 + r.IntN(5000)
			fmt.Fprintf(&b, "%x\r\n%s\r\n", n, strings.Repeat("c", n))
		}
		b.WriteString("0\r\n\r\n")
	default:
		b.WriteString("\r\n")
	}
	return b.String()
}

// TestClientResets ends everything.
func TestClientResets(t *testing.T) {
	w := newWorld(t)
	gone := make(chan error, 1)
	w.at(App, rawServer(t, func(c *net.TCPConn, r *bufio.Reader) {
		http.ReadRequest(r)
		_, err := r.ReadByte()
		gone <- err
	}))
	w.rule("lou", httpServer(t, "lou"))
	c := w.dial()
	c.send(request("POST", "/", "", "Content-Length: 5\r\n\r\n"))
	c.SetLinger(0)
	c.Close()
	select {
	case err := <-gone:
		if err == nil {
			t.Error("no error at the app")
		}
	case <-time.After(10 * time.Second):
		t.Error("the app was not told")
	}
	<-w.ends
}

// TestHTTP1AppGone ends an idle connection whose last request was a laptop's when the app has gone for good, in whatever order that shows.
func TestHTTP1AppGone(t *testing.T) {
	for _, row := range []struct {
		name       string
		asked      bool // the app has had a request before
		first      bool // it is gone before its connection ends
		unanswered bool // the laptop owes an answer
	}{
		{"its connection ends before", true, false, false},
		{"its connection ends after", true, true, false},
		{"it had no connection", false, false, false},
		{"while the laptop answers", true, false, true},
		{"without a connection while the laptop answers", false, true, true},
	} {
		t.Run(row.name, func(t *testing.T) {
			w := newWorld(t)
			end, answer, came := make(chan struct{}), make(chan struct{}), make(chan struct{})
			w.at(App, rawServer(t, func(c *net.TCPConn, r *bufio.Reader) {
				if _, err := http.ReadRequest(r); err == nil {
					io.WriteString(c, "HTTP/1.1 200 OK\r\nContent-Length: 3\r\n\r\napp")
					<-end
				}
			}))
			w.rule("lou", rawServer(t, func(c *net.TCPConn, r *bufio.Reader) {
				if _, err := http.ReadRequest(r); err != nil {
					return
				}
				close(came)
				<-answer
				io.WriteString(c, "HTTP/1.1 200 OK\r\nContent-Length: 3\r\n\r\nlou")
				io.Copy(io.Discard, r) // its connection stays
			}))
			c := w.dial()
			if row.asked {
				c.send("GET / HTTP/1.1\r\nHost: h\r\n\r\n")
				c.answer("GET")
			}
			c.send("GET / HTTP/1.1\r\nHost: h\r\nX-Id: lou\r\n\r\n")
			<-came
			if !row.unanswered {
				close(answer)
				c.answer("GET")
			}
			if row.first {
				w.leave()
				close(end)
			} else {
				close(end)
				w.leave()
			}
			if row.unanswered {
				close(answer)
				if _, got := c.answer("GET"); got != "lou" {
					t.Errorf("%q", got)
				}
			}
			if got := c.rest(); got != "" {
				t.Errorf("%q", got)
			}
			c.Close()
			if err := <-w.ends; err != nil {
				t.Error(err)
			}
		})
	}
}
