package main

import (
	"bufio"
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"io"
	"math/big"
	"net"
	"net/http"
	"strconv"
	"strings"
	"time"
)

// The server's ports.
const (
	portEcho   = 7000 // TCP and UDP: everything comes back
	portSink   = 7001 // reads to the end, then says how many bytes came
	portSource = 7002 // writes until the client closes
	portHTTP   = 7003 // HTTP: "/" answers with the server's name, "/bytes" without end
	portRaw    = 7010 // HTTP: an upgraded request for "/PORT" is a connection to that port
	addTLS     = 100  // added to portSink and portSource: the same inside TLS 1.3

	addNode = 24000 // added to all ports by the server on the node: laptops reach ports from 30000 on there
)

// block is what is written at once: as much as any of the variants moves at once.
const block = 64 << 10

// serve answers on all ports; NAME is what HTTP answers with. The one of that name on the node has other ports.
func serve(ctx context.Context, args []string) error {
	name, add := "app", 0
	if len(args) == 1 {
		name = args[0]
	}
	if name == onNode {
		add = addNode
	}
	web := newPipe()
	handlers := map[int]func(net.Conn){portEcho: echo, portSink: sink, portSource: source, portHTTP: web.put}
	failed := make(chan error, 8)
	go func() { failed <- (&http.Server{Handler: answers(name), ReadHeaderTimeout: time.Minute}).Serve(web) }()
	go func() {
		raw := &http.Server{Addr: fmt.Sprint(":", portRaw+add), Handler: upgraded(handlers), ReadHeaderTimeout: time.Minute}
		failed <- raw.ListenAndServe()
	}()
	for port, handle := range handlers {
		l, err := net.Listen("tcp", fmt.Sprint(":", port+add))
		if err != nil {
			return err
		}
		go func() { failed <- accept(l, handle) }()
	}
	cert, err := selfSigned()
	if err != nil {
		return err
	}
	for _, port := range []int{portSink, portSource} {
		l, err := tls.Listen("tcp", fmt.Sprint(":", port+addTLS+add), &tls.Config{Certificates: []tls.Certificate{cert}, MinVersion: tls.VersionTLS13})
		if err != nil {
			return err
		}
		go func() { failed <- accept(l, handlers[port]) }()
	}
	udp, err := net.ListenUDP("udp", &net.UDPAddr{Port: portEcho + add})
	if err != nil {
		return err
	}
	go func() { failed <- echoUDP(udp) }()
	fmt.Println("serving")
	select {
	case err := <-failed:
		return err
	case <-ctx.Done():
		return nil
	}
}

func accept(l net.Listener, handle func(net.Conn)) error {
	for {
		c, err := l.Accept()
		if err != nil {
			return err
		}
		go handle(c)
	}
}

func echo(c net.Conn) {
	defer c.Close()
	b := make([]byte, 2<<10) // ten thousand connections may be open
	for {
		n, err := c.Read(b)
		if _, werr := c.Write(b[:n]); werr != nil || err != nil {
			return
		}
	}
}

func sink(c net.Conn) {
	defer c.Close()
	b := make([]byte, block)
	for total := int64(0); ; {
		n, err := c.Read(b)
		total += int64(n)
		if errors.Is(err, io.EOF) {
			fmt.Fprintln(c, total)
		}
		if err != nil {
			return
		}
	}
}

func source(c net.Conn) {
	defer c.Close()
	b := make([]byte, block)
	for {
		if _, err := c.Write(b); err != nil {
			return
		}
	}
}

func echoUDP(c *net.UDPConn) error {
	_ = c.SetReadBuffer(4 << 20) // loss shall be the way's
	b := make([]byte, 64<<10)
	for {
		n, from, err := c.ReadFromUDPAddrPort(b)
		if err != nil {
			return err
		}
		_, _ = c.WriteToUDPAddrPort(b[:n], from)
	}
}

func answers(name string) http.Handler {
	m := http.NewServeMux()
	m.HandleFunc("/", func(w http.ResponseWriter, _ *http.Request) { _, _ = io.WriteString(w, name) })
	m.HandleFunc("/bytes", func(w http.ResponseWriter, _ *http.Request) {
		w.Header().Set("Content-Length", strconv.FormatInt(1<<50, 10))
		b := make([]byte, block)
		for {
			if _, err := w.Write(b); err != nil {
				return
			}
		}
	})
	return m
}

// upgraded serves the bare path through the API server: after 101 the request's connection is one to the port that its path names.
func upgraded(handlers map[int]func(net.Conn)) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		port, _ := strconv.Atoi(strings.TrimPrefix(r.URL.Path, "/"))
		handle := handlers[port]
		if handle == nil || r.Header.Get("Upgrade") != rawProtocol {
			http.Error(w, "no such port, or no upgrade", http.StatusBadRequest)
			return
		}
		c, rw, err := http.NewResponseController(w).Hijack()
		if err != nil {
			return
		}
		if _, err := io.WriteString(c, "HTTP/1.1 101 Switching Protocols\r\nConnection: Upgrade\r\nUpgrade: "+rawProtocol+"\r\n\r\n"); err != nil {
			_ = c.Close()
			return
		}
		handle(&readConn{c, rw.Reader})
	})
}

// readConn is a connection of which some bytes were read ahead.
type readConn struct {
	net.Conn
	r *bufio.Reader
}

func (c *readConn) Read(p []byte) (int, error) { return c.r.Read(p) }

// pipe is a listener whose connections somebody puts in.
type pipe struct{ conns chan net.Conn }

func newPipe() *pipe { return &pipe{make(chan net.Conn)} }

func (p *pipe) put(c net.Conn)            { p.conns <- c }
func (p *pipe) Accept() (net.Conn, error) { return <-p.conns, nil }
func (p *pipe) Close() error              { return nil }
func (p *pipe) Addr() net.Addr            { return &net.TCPAddr{Port: portHTTP} }

func selfSigned() (tls.Certificate, error) {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return tls.Certificate{}, err
	}
	der, err := x509.CreateCertificate(rand.Reader, &x509.Certificate{SerialNumber: big.NewInt(1)}, &x509.Certificate{SerialNumber: big.NewInt(1)}, &key.PublicKey, key)
	return tls.Certificate{Certificate: [][]byte{der}, PrivateKey: key}, err
}

// splice passes connections on and copies what comes, by splice(2) where the system has it: the least that a proxy in front of an app costs.
func splice(ctx context.Context, args []string) error {
	if len(args) != 2 {
		return errors.New("want LISTEN TARGET")
	}
	l, err := net.Listen("tcp", args[0])
	if err != nil {
		return err
	}
	context.AfterFunc(ctx, func() { _ = l.Close() })
	return accept(l, func(c net.Conn) {
		defer c.Close()
		to, err := net.Dial("tcp", args[1])
		if err != nil {
			return
		}
		defer to.Close()
		go func() { _, _ = io.Copy(to, c); _ = to.(*net.TCPConn).CloseWrite() }()
		_, _ = io.Copy(c, to)
	})
}
