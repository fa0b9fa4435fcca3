"""Learning from a teacher: a small student follows a video, supervised now and then by a network too big for it.

The method is online model distillation (JITNet: Mullapudi, Chen, Zhang, Ramanan and Fatahalian, "Online Model
Distillation for Efficient Video Inference", ICCV 2019, arXiv 1812.02699). A student that knows only what is on the
screen now can be tens of times cheaper than a teacher that knows everything, if it keeps learning:

    at a key frame  the teacher labels the frame; the student is updated on it until it agrees (accuracy of at least
                    `threshold`) or `u_max` updates are made; the stride to the next key frame is doubled when they
                    agree and halved when they do not, between `stride_min` and `stride_max`
    at any other    the student alone labels the frame

What is the paper's: the loop, its constants, all layers updated by SGD at a large learning rate, momentum kept for
the life of the stream, cross-entropy on the teacher's labels weighted near objects. The authors published their
network and not this loop, and parts of it are known from re-implementations alone: whether the accuracy is the mean or
the smallest IoU, how far an object's box is grown, Nesterov's momentum, the weight decay; each is an option.
From ShadowTutor (Chung, Kim, Moon, ICPP 2020): the piecewise-linear stride, the best weights restored when the
updates did not suffice, and `partial: tail`, which leaves the encoder as it is. Ours: objects from connected regions
where the teacher gives no boxes, what happens when a teacher fails, the baselines, real time, resuming.

Every frame is scored, key frames too, by what the student said before it learnt from that frame; the mask handed to
the user on a key frame is the teacher's and is never scored.

    stride.py     accuracy -> stride: both controllers
    accuracy.py   how far a student's labels agree with a teacher's, in [0, 1]
    objects.py    boxes -> weights of pixels -> loss
    teacher.py    frame -> labels: a network, recorded masks, Mask R-CNN, Hugging Face, ground truth with noise
    options.py    every value that can be chosen
    state.py      where a stream stands, to be saved and resumed
    learning.py   the updates of one key frame
    online.py     the loop, with its baselines
    real_time.py  the same loop with teacher and updates beside inference
    scores.py     agreement with teacher and truth, and what it cost, over time and in total

What it costs, in MACs: every frame the student c_S, key frames the teacher c_T as well, each update c_train, which is
forward and backward. Its limit: with c_T / c_S = 40 and a stride of 64 no more than about 25 times cheaper than the
teacher; what changes faster than the stride is learnt too late; and what the teacher gets wrong is learnt too.
"""
