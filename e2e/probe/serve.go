package main

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"sync/atomic"
	"syscall"
	"time"
)

// The server's ports, TCP unless said otherwise; nobody listens on portClosed, neither with TCP nor with UDP.
const (
	portEcho    = 7000 // TCP and UDP: everything comes back; after FIN comes FIN
	portCount   = 7001 // reads to the end, then writes how many bytes came
	portHalf    = 7002 // ends its direction at once, then reads to the end
	portLast    = 7003 // writes how many bytes the last connections to portHalf and portSink brought, as JSON
	portReset   = 7004 // resets after one byte
	portRude    = 7005 // writes a lot and closes at once
	portSink    = 7006 // reads to the end
	portFull    = 7007 // its queue of connections is full: connecting gets no answer
	portCutOff  = 7008 // writes a lot and resets in the middle
	portClosed  = 7999
	rudeBytes   = 3 << 20
	echoTimeout = 10 * time.Second
)

// last is what portLast tells.
type last struct {
	Half, Sink int64
}

type server struct {
	half, sink atomic.Int64
}

func serve() error {
	s := &server{}
	s.half.Store(-1)
	s.sink.Store(-1)
	failed := make(chan error, 16)
	for port, handle := range map[int]func(*net.TCPConn){
		portEcho: echoTCP, portCount: count, portHalf: s.halfClose, portLast: s.tellLast, portReset: reset, portRude: rude, portSink: s.drain, portCutOff: cutOff,
	} {
		l, err := net.Listen("tcp", fmt.Sprint(":", port))
		if err != nil {
			return err
		}
		go func() {
			for {
				c, err := l.Accept()
				if err != nil {
					failed <- err
					return
				}
				go func() {
					defer c.Close()
					handle(c.(*net.TCPConn))
				}()
			}
		}()
	}
	pc, err := net.ListenPacket("udp", fmt.Sprint(":", portEcho))
	if err != nil {
		return err
	}
	go func() { failed <- echoUDP(pc) }()
	if err := fill(portFull); err != nil {
		return err
	}
	fmt.Println("serving")
	return <-failed
}

func echoTCP(c *net.TCPConn) {
	b := make([]byte, 2<<10) // io.Copy would take a pipe for each of ten thousand connections
	for {
		n, err := c.Read(b)
		if _, werr := c.Write(b[:n]); werr != nil || err != nil {
			return
		}
	}
}

func echoUDP(pc net.PacketConn) error {
	b := make([]byte, 64<<10)
	for {
		n, from, err := pc.ReadFrom(b)
		if err != nil {
			return err
		}
		_, _ = pc.WriteTo(b[:n], from)
	}
}

func count(c *net.TCPConn) {
	n, err := io.Copy(io.Discard, c)
	fmt.Fprintf(c, "%d %v", n, err)
}

func (s *server) halfClose(c *net.TCPConn) {
	s.half.Store(-1)
	_ = c.CloseWrite()
	n, err := io.Copy(io.Discard, c)
	if err == nil {
		s.half.Store(n)
	}
}

func (s *server) drain(c *net.TCPConn) {
	s.sink.Store(-1)
	n, err := io.Copy(io.Discard, c)
	if err == nil {
		s.sink.Store(n)
	}
}

func (s *server) tellLast(c *net.TCPConn) {
	_ = json.NewEncoder(c).Encode(last{Half: s.half.Load(), Sink: s.sink.Load()})
}

func reset(c *net.TCPConn) {
	_, _ = io.ReadFull(c, make([]byte, 1))
	_ = c.SetLinger(0)
}

func rude(c *net.TCPConn) { _, _ = c.Write(make([]byte, rudeBytes)) }

func cutOff(c *net.TCPConn) {
	_, _ = c.Write(make([]byte, 100<<10))
	_, _ = io.ReadFull(c, make([]byte, 1)) // the client has begun to read
	_ = c.SetLinger(0)
}

// fill listens without accepting and connects until the queue is full: from then on Linux drops SYNs (tcp_abort_on_overflow is 0).
func fill(port int) error {
	fd, err := syscall.Socket(syscall.AF_INET6, syscall.SOCK_STREAM|syscall.SOCK_CLOEXEC, 0)
	if err != nil {
		return err
	}
	if err := errors.Join(
		syscall.SetsockoptInt(fd, syscall.IPPROTO_IPV6, syscall.IPV6_V6ONLY, 0),
		syscall.Bind(fd, &syscall.SockaddrInet6{Port: port}),
		syscall.Listen(fd, 0),
	); err != nil {
		return err
	}
	for range 8 {
		c, err := net.DialTimeout("tcp", fmt.Sprint("127.0.0.1:", port), 200*time.Millisecond)
		if err != nil {
			return nil // full
		}
		held = append(held, c)
	}
	return errors.New("the queue of the listener does not get full")
}

// held keeps the connections that fill the queue.
var held []net.Conn
