package mux

import (
	"encoding/binary"
	"math/bits"
	"sync"
)

// A chunk is a pooled buffer with received bytes in b[r:w]. Messages are stored with a length in front (u16, big endian).
type chunk struct {
	next     *chunk
	b        []byte // the whole buffer
	r, w     int
	messages bool
}

const (
	minChunkLog = 9  // 512 bytes
	maxChunkLog = 16 // 64 KiB: a full frame, or a full message with its length
)

var chunkPools [maxChunkLog - minChunkLog + 1]sync.Pool

// getChunk returns an empty chunk with room for n bytes, at most 64 KiB.
func getChunk(n int) *chunk {
	class := max(bits.Len(uint(max(n, 1)-1)), minChunkLog) - minChunkLog
	c, _ := chunkPools[class].Get().(*chunk)
	if c == nil {
		c = &chunk{b: make([]byte, 1<<(class+minChunkLog))}
	}
	return c
}

func (c *chunk) recycle() {
	class := bits.Len(uint(len(c.b))) - 1 - minChunkLog
	c.next, c.r, c.w, c.messages = nil, 0, 0, false
	chunkPools[class].Put(c)
}

func (c *chunk) room() int { return len(c.b) - c.w }

// chunks is a queue of received bytes. Its user locks it.
type chunks struct {
	head, tail *chunk
	bytes      int // what is stored, with the lengths of messages
}

func (q *chunks) push(c *chunk) {
	q.bytes += c.w - c.r
	if q.tail == nil {
		q.head = c
	} else {
		q.tail.next = c
	}
	q.tail = c
}

func (q *chunks) pop() *chunk {
	c := q.head
	if c == nil {
		return nil
	}
	q.head = c.next
	if q.head == nil {
		q.tail = nil
	}
	c.next = nil
	q.bytes -= c.w - c.r
	return c
}

// tailFor returns the last chunk if n more bytes of the same sort fit into it, else a new one, pushed. The longer the queue,
// the larger the new chunk, so that many small frames cost about their own size.
func (q *chunks) tailFor(n int, messages bool) *chunk {
	if t := q.tail; t != nil && t.messages == messages && t.room() >= n {
		return t
	}
	c := getChunk(min(max(n, q.bytes), 1<<maxChunkLog))
	c.messages = messages
	q.push(c)
	return c
}

// add copies p to the end of the queue.
func (q *chunks) add(p []byte) {
	if len(p) == 0 {
		return
	}
	c := q.tailFor(len(p), false)
	c.w += copy(c.b[c.w:], p)
	q.bytes += len(p)
}

// addMessage copies p with its length to the end of the queue.
func (q *chunks) addMessage(p []byte) {
	c := q.tailFor(len(p)+2, true)
	binary.BigEndian.PutUint16(c.b[c.w:], uint16(len(p)))
	c.w += 2 + copy(c.b[c.w+2:], p)
	q.bytes += 2 + len(p)
}

// drop empties the queue.
func (q *chunks) drop() {
	for c := q.pop(); c != nil; c = q.pop() {
		c.recycle()
	}
}
